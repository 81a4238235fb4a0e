"""Masks of what changes from picture to picture of a folder, or from frame to frame of a clip: no model.

What never changes is not the subject: a watermark, a logo, a frame, a bar of subtitles. It is black in the mask.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.folders import walk_files
from masked_loss_triton.generate.engine import Found, FrameMask, WholeEngine
from masked_loss_triton.generate.prompts import MaskRequest

FEWEST = 8  # pictures or frames: fewer have too much in common by chance
# A pixel is static where its standard deviation is below so much of the picture's median one, levels within these bounds.
STILL, LEAST, MOST = 0.25, 4.0, 12.0
SMALLEST = 0.0003  # of the picture: smaller spots are chance


def add_arguments(group: Any) -> None:
    """Adds the folder whose pictures are compared."""
    group.add_argument(
        "--static_dir",
        default="",
        metavar="DIR",
        help="pictures of one size are compared in here (default: --images)",
    )


def load(request: MaskRequest, *, static_dir: str = "", **_: Any) -> StaticEngine:
    """Makes the engine; pictures are compared when the first one needs it."""
    return StaticEngine(request, Path(static_dir))


class Spread:
    """Sums pictures of one size, and says where they never change."""

    def __init__(self) -> None:
        self.count = 0
        self.sum: np.ndarray | None = None
        self.squares: np.ndarray | None = None

    def add(self, picture: np.ndarray) -> None:
        """Adds a picture, (H, W, 3) uint8."""
        values = picture.astype(np.float64)
        if self.sum is None or self.squares is None:
            self.sum, self.squares = np.zeros_like(values), np.zeros_like(values)
        self.sum += values
        self.squares += values**2
        self.count += 1

    def static(self) -> np.ndarray | None:
        """Where they never change, (H, W) bool; None of too few."""
        import cv2

        if self.count < FEWEST or self.sum is None or self.squares is None:
            return None
        mean = self.sum / self.count
        deviation = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0)).max(axis=2).astype(np.float32)
        deviation = cv2.GaussianBlur(deviation, (0, 0), 0.7)
        limit = float(np.clip(STILL * np.median(deviation), LEAST, MOST))
        still = (deviation < limit).astype(np.uint8)
        still = cv2.morphologyEx(still, cv2.MORPH_OPEN, np.ones((2, 2), np.uint8)).astype(np.uint8)
        # A logo's sharp edges vary with the compression of what is around them.
        still = cv2.morphologyEx(still, cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8)).astype(np.uint8)
        _, parts, facts, _ = cv2.connectedComponentsWithStats(still, connectivity=8)
        kept = facts[:, cv2.CC_STAT_AREA] >= SMALLEST * still.size
        kept[0] = False
        return kept[parts]


class StaticEngine(WholeEngine):
    """Makes masks of what changes.

    Args:
        request: how it becomes a mask.
        folder: whose pictures are compared.
    """

    nothing = "nothing in it is the same everywhere"

    def __init__(self, request: MaskRequest, folder: Path) -> None:
        super().__init__(request)
        self.folder, self.lock = folder, threading.Lock()
        self.statics: dict[tuple[int, int], np.ndarray | None] | None = None

    def find(self, picture: np.ndarray, source: Path) -> Found:
        """See `WholeEngine`.

        Raises:
            UserError: for a picture of a size that too few others have.
        """
        with self.lock:
            if self.statics is None:
                self.statics = self._compare()
        static = self.statics.get(picture.shape[:2])
        if static is None:
            size = f"{picture.shape[1]}x{picture.shape[0]}"
            raise UserError(
                f"{source}: fewer than {FEWEST} pictures of {size} in {self.folder}: too few to tell what never changes"
            )
        return self.one_instance(~static) if static.any() else {}

    def masks_of_clip(self, frames: Iterable[np.ndarray], source: Path) -> Iterator[FrameMask]:
        """Makes the mask of each frame: that of the whole clip, which is read twice."""
        from masked_loss_triton.masks.frames import read_clip

        spread = Spread()
        for frame in frames:
            spread.add(frame)
        static = spread.static()
        if static is None:
            raise UserError(f"{source} has fewer than {FEWEST} frames: too few to tell what never changes")
        found = self.one_instance(~static) if static.any() else {}
        for frame in read_clip(source):
            yield self.mask_of(frame, found)

    def _compare(self) -> dict[tuple[int, int], np.ndarray | None]:
        from masked_loss_triton.files.notes import read_png_note
        from masked_loss_triton.masks.frames import MASK_EXTENSIONS
        from masked_loss_triton.masks.reading import read_picture

        spreads: dict[tuple[int, int], Spread] = {}
        for file in walk_files(self.folder):
            if file.suffix.lower() not in MASK_EXTENSIONS or (file.suffix.lower() == ".png" and read_png_note(file)):
                continue  # no picture, or a mask or sheet of an earlier run
            try:
                picture = read_picture(file).rgb
            except UserError:  # it is told when its own mask is made
                continue
            spreads.setdefault(picture.shape[:2], Spread()).add(picture)
        return {size: spread.static() for size, spread in spreads.items()}
