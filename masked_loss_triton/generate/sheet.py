"""Makes the contact sheet: every mask over its picture, read back from the files, the doubtful ones first."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.contact_sheet import ACCENT, MAX_STRIP, Card, draw, save_sheet
from masked_loss_triton.generate.backends import WHOLE, WORDLESS
from masked_loss_triton.generate.jobs import Job
from masked_loss_triton.generate.mask_files import read_note
from masked_loss_triton.generate.quality import marks_of
from masked_loss_triton.masks.frames import clip_frame_count, read_clip, read_frames, to_uint8
from masked_loss_triton.masks.reading import read_mask_file, read_picture

SIDE = 448  # longest side of what is kept of a picture, pixels: twice a panel


def write_sheet(name: Path, jobs: list[Job], limit: int, title: str) -> int:
    """Writes NAME.png and NAME.html with at most `limit` items, and returns how many it has.

    Those without a mask come first, then those with marks (see `quality`), most marks first; the others are chosen evenly.

    Raises:
        UserError: naming the file that cannot be written.
    """
    marks = {job.source: _marks(job) for job in jobs}
    missing = [job for job in jobs if job.mask() is None]
    missing += sorted((job for job in jobs if marks[job.source]), key=lambda job: -len(marks[job.source]))
    missing = missing[:limit]
    others = [job for job in jobs if job.mask() is not None and not marks[job.source]]
    space = limit - len(missing)
    if len(others) > space:
        others = [others[index * len(others) // space] for index in range(space)] if space else []
    cards, images = [], []
    for job in missing + others:
        # What cannot be read has been told as a problem already, and a mask of another size or length is for `check` to tell.
        with contextlib.suppress(UserError, ValueError):
            cards.append(_card(job, marks[job.source]))
            images.append(draw(cards[-1]))
    if cards:
        notes = [f"{len(cards)} of {len(jobs)} items. Full colour is learned with weight 1, dark red with weight 0."]
        save_sheet(name, title, cards, images, notes)
    return len(cards)


def choose_sheet_name(given: str | None, images: Path, masks: Path) -> Path:
    """Returns the name of the contact sheet without its ending: never where it would be read as a picture or as a mask.

    By default it is `masks` with `_sheet`, or, where that would be among the pictures, the same beside `images`.

    Raises:
        UserError: for a given name in one of the two folders.
    """
    pictures, found = images.resolve(), masks.resolve()
    if given is None:
        folder = masks if masks.name else found  # "." has no name
        beside = folder.with_name(f"{folder.name}_sheet")
        among = beside.resolve().is_relative_to(pictures)
        return pictures.with_name(f"{pictures.name}_{found.name}_sheet") if among else beside
    for flag, folder in (("--images", pictures), ("--masks", found)):
        if Path(given).resolve().is_relative_to(folder):
            raise UserError(
                f"--sheet {given} is in {flag} and would be read as a picture or mask: give another place", 2
            )
    return Path(given)


def _marks(job: Job) -> list[str]:
    with contextlib.suppress(UserError, ValueError):
        return marks_of(job)
    return []


def _card(job: Job, marks: list[str]) -> Card:
    mask_path = job.mask()
    note = (read_note(mask_path) if mask_path is not None else None) or {}
    pictures, masks = (_clip if job.is_clip else _picture)(job, mask_path, note)
    weights = np.stack(masks).astype(np.float32) / 255
    return Card(
        name=str(job.source).encode("utf-8", "backslashreplace").decode(),
        facts=[
            _found(note, mask_path),
            f"mean weight {weights.mean():.1%}" if mask_path is not None else "",
            *([f"look at it: {'; '.join(marks)}"] if marks else []),
        ],
        picture_label="middle frame" if job.is_clip else "picture",
        pictures=pictures,
        mask=weights[len(weights) // 2],
        raw=weights,
        weights=weights,
    )


def _found(note: dict[str, Any], mask_path: Path | None) -> str:
    if mask_path is None:
        return "NO MASK: nothing was found, or it could not be made"
    if not note:
        return "made by hand or by another program"
    if note["found"] and all(one["score"] is None for one in note["found"]):
        return "nothing was looked for: cut out of the box that was given"
    if note["backend"] in WHOLE and note["found"]:
        return f"{WORDLESS[note['backend']]} is white"
    counts: dict[str, list[float]] = {}
    for one in note["found"]:
        counts.setdefault(one["words"], []).append(one["score"])
    said = [f"{words} x{len(scores)} (best score {max(scores):.2f})" for words, scores in counts.items()]
    return "found: " + (", ".join(said) or "nothing")


def _picture(job: Job, mask_path: Path | None, note: dict[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    picture = read_picture(job.source).rgb
    mask = np.zeros(picture.shape[:2], np.uint8) if mask_path is None else to_uint8(read_mask_file(mask_path))
    scale = SIDE / max(picture.shape[:2])
    small = Image.fromarray(_shrink(picture))
    pen = ImageDraw.Draw(small)
    for one in note.get("found", []):
        left, top, right, bottom = (edge * min(scale, 1) for edge in one["box"])
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=ACCENT, width=2)
    return [np.asarray(small)], [_shrink(mask)]


def _clip(job: Job, mask_path: Path | None, note: dict[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    count = max(clip_frame_count(job.source) if mask_path is None else clip_frame_count(mask_path), 1)
    chosen = set(np.linspace(0, count - 1, min(count, MAX_STRIP)).round().astype(int).tolist())
    frames = [_shrink(frame) for index, frame in enumerate(read_clip(job.source)) if index in chosen]
    if mask_path is None:
        return frames, [np.zeros(frame.shape[:2], np.uint8) for frame in frames]
    masks = [_shrink(frame) for index, frame in enumerate(read_frames(mask_path)) if index in chosen]
    return frames, masks


def _shrink(pixels: np.ndarray) -> np.ndarray:
    scale = SIDE / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
