"""The pictures and clips of a data set with their masks: found, read, and written when a person has drawn on them.

A mask is edited in the stored pixels of its picture, as the trainer and `cache` read both. What is saved carries the note
"drawn", so that `generate` keeps it; what it replaces is kept as a copy until the next session of the editor.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from masked_loss_triton.edit.copies import Copies
from masked_loss_triton.edit.entries import Entry
from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import check_replaceable, replace_file
from masked_loss_triton.files.notes import png_note, read_png_note
from masked_loss_triton.generate.mask_files import write_frames
from masked_loss_triton.masks.frames import (
    MASK_EXTENSIONS,
    frame_files,
    mask_frame_files,
    read_clip,
    read_frames,
    to_uint8,
)
from masked_loss_triton.masks.reading import opaque, open_image, read_alpha, read_mask_file, read_picture
from masked_loss_triton.masks.sources import EXIF_ORIENTATION, align_to_picture, exif_orientation

DRAWN = {"drawn": "masked-loss edit"}
CARRIED = {**DRAWN, "carried": True}  # by a program from a frame that was drawn
CLIPS_OPEN = 2  # decoded at a time
FRAMES_OPEN = 400  # of a clip: 400 frames of 832 x 480 are half a gigabyte


class Changed(UserError):
    """The mask on the disk is not the one that was opened: another tab, another program."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """One mask as it is on the disk: (H, W) uint8 in the size of its picture, and what tells whether it changed since."""

    pixels: np.ndarray
    version: str


class Library:
    """Reads pictures and masks and saves masks. Safe to call from several threads.

    Args:
        entries: the pictures and clips with their plain masks.
        labels: the same ones with the masks of each label.
    """

    def __init__(self, entries: Sequence[Entry], labels: Mapping[str, Sequence[Entry]] | None = None) -> None:
        self.entries, self.labels = list(entries), dict(labels or {})
        self.copies = Copies(f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
        owners: dict[str, set[str]] = {}
        for entry in itertools.chain(self.entries, *self.labels.values()):
            for path in {entry.target, *entry.masks}:
                owners.setdefault(os.path.abspath(path), set()).add(os.path.abspath(entry.source))
        self._shared = {path for path, sources in owners.items() if len(sources) > 1}
        self.writing = threading.Lock()
        self._frames = functools.lru_cache(CLIPS_OPEN)(_decode_clip)
        self._decoding = threading.Lock()

    def entry(self, number: int, label: str = "") -> Entry:
        """The picture or clip of this number, with the mask of a label, or its plain one.

        Raises:
            UserError: for a number or label that is not there.
        """
        if label and label not in self.labels:
            raise UserError(f"there is no label {label[:40]!r}: give it with --mask_labels")
        entries = self.labels[label] if label else self.entries
        if not 0 <= number < len(entries):
            raise UserError(f"there are {len(entries)} pictures and clips, not {number + 1}")
        return entries[number]

    def together(self, number: int, frame: int = 0) -> np.ndarray | None:
        """The plain mask and those of all labels together, (H, W) uint8: the largest of each pixel; None where there is none."""
        entries = [self.entry(number, label) for label in ("", *self.labels)]
        masks = [self.mask(entry, frame).pixels for entry in entries if entry.mask() is not None]
        return np.maximum.reduce(masks) if masks else None

    def frame_count(self, entry: Entry) -> int:
        """Number of frames of a clip, 1 for a picture. Decodes the clip."""
        return len(self._clip(entry)) if entry.is_clip else 1

    def picture(self, entry: Entry, frame: int = 0) -> np.ndarray:
        """(H, W, 3) uint8, as it is stored: the trainer does not turn pictures upright.

        Raises:
            UserError: naming the file that cannot be read, or the frame that it has not.
        """
        if not entry.is_clip:
            return read_picture(entry.source, exif=False).rgb
        frames = self._clip(entry)
        if not 0 <= frame < len(frames):
            raise UserError(f"{entry.source} has frames 0 to {len(frames) - 1}, not {frame}")
        return frames[frame]

    def _clip(self, entry: Entry) -> Sequence[np.ndarray]:
        with self._decoding:
            return self._frames(entry.source)

    def size(self, entry: Entry) -> tuple[int, int]:
        """(width, height) of the picture or of the frames, pixels."""
        if entry.is_clip:
            height, width = self.picture(entry).shape[:2]
            return width, height
        with open_image(entry.source) as image:
            return image.size

    def mask(self, entry: Entry, frame: int = 0) -> Opened:
        """The mask of a picture or of one frame; black where there is none yet.

        Raises:
            UserError: naming the file that cannot be read or does not fit its picture.
        """
        path, size = entry.mask(), self.size(entry)
        if path is None:
            return Opened(np.zeros(size[::-1], np.uint8), "none")
        if path.is_dir():
            files = mask_frame_files(path, entry.source)
            if frame >= len(files):
                return Opened(np.zeros(size[::-1], np.uint8), "none")
            path = files[frame]
        elif entry.is_clip and path.suffix.lower() not in MASK_EXTENSIONS:
            version = _version(path)
            for index, pixels in enumerate(read_frames(path, clip=entry.source)):
                if index == frame:
                    return Opened(align_to_picture(pixels, size, path, entry.source), version)
            return Opened(np.zeros(size[::-1], np.uint8), "none")
        version = _version(path)
        pixels = to_uint8(read_mask_file(path, exif=False))
        return Opened(align_to_picture(pixels, size, path, entry.source), version)

    def save(
        self,
        entry: Entry,
        pixels: np.ndarray,
        version: str | None,
        frame: int = 0,
        note: Mapping[str, object] = DRAWN,
    ) -> str:
        """Writes the mask of a picture or of one frame, as 8-bit grey PNG, and keeps what was there before.

        Args:
            entry: the picture or clip.
            pixels: (H, W) uint8, as the picture is stored.
            version: of the mask that was opened; None writes over whatever is there now.
            frame: of a clip.
            note: what is noted in the file.

        Returns:
            The new version.

        Raises:
            Changed: when the mask is not the one that was opened.
            UserError: naming the file that cannot be written, or a picture that is gone.
        """
        size = self.size(entry)
        if pixels.shape != size[::-1]:
            raise UserError(f"{entry.source} is {size[0]}x{size[1]} now: open it again")
        with self.writing:
            self._check_may_be_saved(entry)
            if version is not None and self.mask(entry, frame).version != version:
                raise Changed(f"the mask of {entry.name} was changed by another tab or program")
            self.copies.keep(entry.target)
            if entry.is_clip:
                file = self._frame_file(entry, frame)
            else:
                entry.target.parent.mkdir(parents=True, exist_ok=True)
                file = entry.target
            orientation = 1 if entry.is_clip else exif_orientation(entry.source)
            replace_file(file, lambda data: _save(data, pixels, orientation, note))
            if not entry.is_clip:
                self._take_others_away(entry)
            return _version(file)

    def _check_may_be_saved(self, entry: Entry) -> None:
        """Refuses where a saved mask would not be the one that `cache` reads, or would change that of something else.

        Raises:
            UserError: naming the mask, and what to do.
        """
        for path in (entry.target, *entry.masks):
            if os.path.abspath(path) in self._shared:
                raise UserError(f"{path} would be the mask of several pictures or clips: give each one of its own")
            if os.path.islink(path):
                raise UserError(f"{path} is a link: put the mask itself in its place to change it here")
            if path.is_file():
                check_replaceable(path)
        if entry.fixed is not None and entry.fixed != entry.target:
            raise UserError(
                f"{entry.fixed} is named by a list, where only the PNG of a picture can be changed: leave mask_path out"
            )
        if entry.dataset.alpha_mask and not entry.is_clip:
            alpha = read_alpha(entry.source, exif=False)
            if alpha is not None and not opaque(alpha):
                raise UserError(
                    f"{entry.source} has its mask in its alpha channel, which is read before files (alpha_mask)"
                )

    def is_drawn_frame(self, entry: Entry, frame: int) -> bool:
        """Whether the mask of a frame was drawn by hand in the editor, and not carried there."""
        if not entry.target.is_dir():
            return False
        files = mask_frame_files(entry.target, entry.source)
        note = read_png_note(files[frame]) if frame < len(files) else None
        return note is not None and "drawn" in note and "carried" not in note

    def revert(self, entry: Entry) -> bool:
        """Puts back what was there when this session first saved the entry; False where it saved nothing."""
        with self.writing:
            return self.copies.restore({entry.target, *entry.masks})

    def _take_others_away(self, entry: Entry) -> None:
        """Moves masks of other names to the copies: `cache` would find two masks for one picture, or the older one first."""
        for path in entry.masks:
            if path != entry.target:
                self.copies.take_away(path)

    def _frame_file(self, entry: Entry, frame: int) -> Path:
        """The PNG of a frame in the folder of the clip's mask, which is made of a still or a video if need be."""
        if not entry.target.is_dir():
            still = entry.mask()
            count = self.frame_count(entry)
            write_frames(entry.target, ((mask, CARRIED) for mask in self._all(entry, still, count)), lambda path: None)
            self._take_others_away(entry)
        files = mask_frame_files(entry.target, entry.source)
        if frame >= len(files):
            raise UserError(
                f"{entry.target} has {len(files)} frames, not {frame + 1}: make a mask for every frame first"
            )
        return files[frame]

    def _all(self, entry: Entry, mask: Path | None, count: int) -> Iterator[np.ndarray]:
        """The masks of all frames: of a video, of a still that is repeated, or black."""
        if mask is None or mask.suffix.lower() in MASK_EXTENSIONS:
            opened = self.mask(entry)
            yield from (opened.pixels for _ in range(count))
            return
        black = np.zeros(self.size(entry)[::-1], np.uint8)
        frames = itertools.chain(read_frames(mask, clip=entry.source), itertools.repeat(black))
        yield from itertools.islice(frames, count)


def is_drawn(path: Path) -> bool:
    """Whether a mask was saved by the editor: a PNG, or a folder in which it saved a frame."""
    files = frame_files(path, MASK_EXTENSIONS) if path.is_dir() else [path]
    return any("drawn" in (read_png_note(file) or {}) for file in files)


def _decode_clip(source: Path) -> list[np.ndarray]:
    frames: list[np.ndarray] = []
    for frame in read_clip(source):
        frames.append(frame)
        if len(frames) > FRAMES_OPEN:
            raise UserError(f"{source} has more than {FRAMES_OPEN} frames: cut it into shorter clips to edit its masks")
    if not frames:
        raise UserError(f"{source} has no frames: replace or remove it")
    return frames


def _save(file: BinaryIO, pixels: np.ndarray, orientation: int, note: Mapping[str, object]) -> None:
    extra = {}
    if orientation > 1:
        # Programs that turn the picture upright turn its mask as well.
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        extra["exif"] = exif.tobytes()
    Image.fromarray(pixels).save(file, "PNG", pnginfo=png_note(dict(note)), **extra)


def _version(path: Path) -> str:
    status = os.stat(path)
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"
