"""Masks where the two pictures of an edit pair differ: no model. The control picture is found by the stem of the target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.engine import Found, FrameMask, WholeEngine
from masked_loss_triton.generate.prompts import MaskRequest

BLOCK = 16  # of JPEG with subsampled colours
LEAST, MOST = 10.0, 18.0  # levels that count as a difference, between nearly no noise and much of it
SHARP = 0.4  # of the difference nearby: the outline of what differs lies where it falls below
LARGEST_HOLE = 0.2  # of what differs: a hole in it that looks alike by chance is its own


def add_arguments(group: Any) -> None:
    """Adds the folder of the control pictures."""
    group.add_argument(
        "--difference_dir",
        default="",
        metavar="DIR",
        help="the control pictures and clips of an edit data set, by stem",
    )


def load(request: MaskRequest, *, difference_dir: str = "", **_: Any) -> DifferenceEngine:
    """Makes the engine.

    Raises:
        UserError: without a folder of control pictures.
    """
    if not difference_dir or not Path(difference_dir).is_dir():
        said = f"--difference_dir {difference_dir} is no folder" if difference_dir else "--backend difference"
        raise UserError(f"{said}: give the folder of the control pictures with --difference_dir", 2)
    return DifferenceEngine(request, Path(difference_dir))


class DifferenceEngine(WholeEngine):
    """Makes masks of where targets differ from their controls."""

    nothing = "target and control do not differ"

    def __init__(self, request: MaskRequest, controls: Path) -> None:
        super().__init__(request)
        self.controls = controls

    def find(self, picture: np.ndarray, source: Path) -> Found:
        """See `WholeEngine`."""
        from masked_loss_triton.masks.frames import IMAGE_EXTENSIONS
        from masked_loss_triton.masks.reading import read_picture

        return self._found(picture, read_picture(self._control(source, IMAGE_EXTENSIONS)).rgb)

    def masks_of_clip(self, frames: Iterable[np.ndarray], source: Path) -> Iterator[FrameMask]:
        """Makes the mask of each frame, beside the control clip's frame of that number, or its last one."""
        from masked_loss_triton.masks.frames import VIDEO_EXTENSIONS, read_clip

        controls = read_clip(self._control(source, VIDEO_EXTENSIONS))
        control = None
        for frame in frames:
            control = next(controls, control)
            if control is None:
                raise UserError(f"the control clip of {source} has no frames")
            yield self.mask_of(frame, self._found(frame, control))

    def _found(self, target: np.ndarray, control: np.ndarray) -> Found:
        return self.one_instance(differing(target, control))

    def _control(self, source: Path, kinds: Sequence[str]) -> Path:
        # The folder of the controls mirrors that of the targets, or is flat.
        parents = list(source.parents)
        for depth in range(len(parents)):
            folder = self.controls / source.parent.relative_to(parents[depth])
            for kind in kinds:
                if (file := folder / (source.stem + kind)).is_file():
                    return file
        raise UserError(f"{source} has no control of its stem in --difference_dir {self.controls}")


def differing(target: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Returns where a picture differs from another by more than the noise of their compression, (H, W) bool.

    Args:
        target: (H, W, 3) uint8.
        control: the same picture before the edit; resized where its size is another.
    """
    import cv2

    height, width = target.shape[:2]
    if control.shape != target.shape:
        control = cv2.resize(control, (width, height), interpolation=cv2.INTER_AREA)
    planes = (cv2.cvtColor(one, cv2.COLOR_RGB2YCrCb).astype(np.float32) for one in (target, control))
    difference = cv2.GaussianBlur(np.abs(next(planes) - next(planes)), (0, 0), 0.6).max(axis=2)
    low = float(np.clip(1.5 * _noise(difference), LEAST, MOST))
    near = (difference > low).astype(np.uint8)
    count, parts = cv2.connectedComponents(near, connectivity=8)
    sure = np.zeros(count, bool)
    sure[np.unique(parts[difference > 2 * low])] = True
    sure[0] = False
    found: Any = cv2.morphologyEx(
        sure[parts].astype(np.uint8), cv2.MORPH_CLOSE, _disc(max(2, max(height, width) // 80))
    )
    found = _fill(found)
    # Compression smears what differs over its neighbours: along the outline only what is strong beside its own side counts.
    strong = difference > SHARP * cv2.dilate(cv2.blur(difference * found, (3, 3)), _disc(4))
    found = cv2.erode(found, _disc(3)) | (found & strong)
    found = _fill(cv2.morphologyEx(found, cv2.MORPH_CLOSE, _disc(2)))
    return cv2.morphologyEx(found, cv2.MORPH_OPEN, _disc(2)) > 0


def _noise(difference: np.ndarray) -> float:
    """The largest difference in a block of the quietest tenth of them."""
    height, width = (max(BLOCK, side // BLOCK * BLOCK) for side in difference.shape)
    padded = np.pad(difference, [(0, max(0, BLOCK - side)) for side in difference.shape])[:height, :width]
    blocks = padded.reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK).max(axis=(1, 3))
    return float(np.quantile(blocks, 0.1))


def _disc(radius: int) -> np.ndarray:
    import cv2

    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))


def _fill(mask: np.ndarray) -> np.ndarray:
    """Fills small holes of a mask of 0 and 1."""
    import cv2

    _, parts, facts, _ = cv2.connectedComponentsWithStats(1 - mask, connectivity=4)
    hole = facts[:, cv2.CC_STAT_AREA] <= LARGEST_HOLE * mask.sum()
    hole[0] = False
    border = np.concatenate([parts[0], parts[-1], parts[:, 0], parts[:, -1]])
    hole[np.unique(border)] = False
    return (mask.astype(bool) | hole[parts]).astype(np.uint8)
