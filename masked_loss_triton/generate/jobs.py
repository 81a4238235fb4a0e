"""Finds the pictures and clips that get a mask, where it goes, and the masks that they have."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.folders import walk_files
from masked_loss_triton.files.shard import WHOLE, Shard
from masked_loss_triton.generate.mask_files import is_mask
from masked_loss_triton.masks.frames import MASK_EXTENSIONS, VIDEO_EXTENSIONS
from masked_loss_triton.masks.reading import UNREAD_EXTENSIONS


@dataclasses.dataclass(frozen=True)
class Job:
    """A picture or clip, and its mask.

    Attributes:
        source: the picture or clip.
        target: where its mask goes: a PNG for a picture, a folder of PNGs or an MKV for a clip.
        is_clip: whether it is a clip.
        masks: those it had when the run began, whoever made them, the one that `cache` reads first.
    """

    source: Path
    target: Path
    is_clip: bool
    masks: tuple[Path, ...] = ()

    def mask(self) -> Path | None:
        """The mask that is there now, or None."""
        return next((path for path in (self.target, *self.masks) if is_mask(path)), None)


@dataclasses.dataclass(frozen=True)
class Jobs:
    """What a folder holds: jobs in the order of their paths, one line for each file that cannot have a mask of its own, and
    how many files of each picture format that is not read (".heic")."""

    jobs: list[Job]
    problems: list[str]
    unread: Counter[str]


def find_jobs(images: Path, masks: Path, clip_suffix: str = "", shard: Shard = WHOLE, label: str = "") -> Jobs:
    """Every picture and clip below a folder; sub-folders are mirrored.

    Masks are found by stem, so two pictures, or two clips, of one stem in one folder are a problem.

    Args:
        images: the pictures and clips. Hidden files and folders, and `masks`, are left out.
        masks: the folder of the masks; it need not exist.
        clip_suffix: ".mkv" for a video as the mask of a clip, "" for a folder of PNGs.
        shard: only this part. Pictures and clips of one stem in one folder are in the same.
        label: of the masks, which are then called NAME.LABEL; "" for plain masks.

    Raises:
        UserError: when the folder does not exist, or is the one that masks go to.
    """
    if not images.is_dir():
        raise UserError(f"--images {images} is not a folder", 2)
    output = masks.resolve()
    if images.resolve() == output:
        raise UserError("--images and --masks must be two folders: masks are found by the stem of the picture", 2)
    found = Jobs([], [], Counter())
    by_folder: dict[Path, list[Path]] = {}
    for source in walk_files(images, leave_out={output}):
        kind = source.suffix.lower()
        if (source.relative_to(images).parent / source.stem) not in shard:
            continue
        if kind in (*MASK_EXTENSIONS, *VIDEO_EXTENSIONS):
            by_folder.setdefault(source.parent, []).append(source)
        elif kind in UNREAD_EXTENSIONS:
            found.unread[kind] += 1
    for folder, sources in by_folder.items():
        _add_jobs(found, sources, masks / folder.relative_to(images), clip_suffix, f".{label}" if label else "")
    return found


def _add_jobs(found: Jobs, sources: list[Path], target_folder: Path, clip_suffix: str, label: str) -> None:
    """The jobs of one folder."""
    masks = _masks_by_stem(target_folder)
    pictures: dict[str, Path] = {}
    clips: dict[str, Path] = {}
    for source in sources:
        is_clip = source.suffix.lower() in VIDEO_EXTENSIONS
        first = (clips if is_clip else pictures).setdefault(source.stem, source)
        if first is not source:
            found.problems.append(f"{source} has the same stem as {first.name}: rename one of them")
    # In the order of the sources, the clips among the pictures.
    for source in sources:
        name = source.stem + label
        if clips.get(source.stem) is source and source.with_suffix("").is_dir():
            text = f"{source}: its frames and the masks of the folder {source.stem} would mix: rename one of them"
            found.problems.append(text)
        elif clips.get(source.stem) is source:
            # A still is the mask of a picture of that stem, where there is one.
            mine = [path for path in masks.get(name, ()) if source.stem not in pictures or not _is_still(path)]
            target = target_folder / (name + clip_suffix)
            found.jobs.append(Job(source, target, True, tuple(filter(is_mask, mine))))
        elif pictures.get(source.stem) is source:
            # Not with_suffix: a stem may have a point in it.
            mine = [path for path in masks.get(name, ()) if _is_still(path)]
            target = target_folder / f"{name}.png"
            found.jobs.append(Job(source, target, False, tuple(filter(is_mask, mine))))


def _masks_by_stem(folder: Path) -> dict[str, list[Path]]:
    """What `cache` could take for a mask in a folder, by stem, in the order in which it takes them: sub-folders, videos, stills."""
    kinds = (*VIDEO_EXTENSIONS, *MASK_EXTENSIONS)
    ranked: dict[str, list[tuple[int, Path]]] = {}
    try:
        names = sorted(os.listdir(folder))
    except OSError:  # not there yet, or one line when the first mask is written
        return {}
    for name in names:
        stem, extension = os.path.splitext(name)
        path = folder / name
        if extension.lower() in kinds and not path.is_dir():
            ranked.setdefault(stem, []).append((kinds.index(extension.lower()), path))
        else:
            ranked.setdefault(name, []).append((-1, path))
    return {stem: [path for _, path in sorted(places)] for stem, places in ranked.items()}


def _is_still(path: Path) -> bool:
    return path.suffix.lower() in MASK_EXTENSIONS and not path.is_dir()
