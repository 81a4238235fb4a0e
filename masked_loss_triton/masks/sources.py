"""Where the mask of each picture or clip is: alpha channel, mask file, default mask, full weight, in this order."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.frames import MASK_EXTENSIONS, UNREAD_EXTENSIONS, VIDEO_EXTENSIONS, to_uint8
from masked_loss_triton.masks.reading import opaque, open_image, read_alpha, read_mask_file

MAX_ASPECT_DIFFERENCE = 0.01
EXIF_ORIENTATION = 0x0112


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A place where a mask may be: kind "alpha", "file" or "default", and the file, folder of frames or video."""

    kind: str
    path: Path


class MaskDirectory:
    """The mask files of a folder, found by the stem of the picture or clip in one pass over the folder.

    A clip may have a folder of frames, a video or one still; the frames come first, since a video's masks are lossy.
    A picture with several mask files takes the first extension of `MASK_EXTENSIONS`; `ambiguous` lists them. `unread` are
    pictures and videos of formats that are not read.

    Raises:
        UserError: when the folder does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.stills: dict[str, Path] = {}
        self.videos: dict[str, Path] = {}
        self.folders: dict[str, Path] = {}
        self.ambiguous: list[tuple[Path, Path]] = []
        self.unread: list[Path] = []
        try:
            with os.scandir(path) as scan:
                # Hidden ones are files of the system (._a.png), copies of replaced masks, temporary files.
                shown = (entry for entry in scan if not entry.name.startswith("."))
                entries = sorted(shown, key=lambda entry: (_rank(entry.name), entry.name))
        except OSError as error:
            raise UserError(f"mask_directory {path} cannot be read ({error.strerror}): correct it", 2) from error
        for entry in entries:
            stem, extension = os.path.splitext(entry.name)
            if extension.lower() in MASK_EXTENSIONS:
                table = self.stills
            elif extension.lower() in VIDEO_EXTENSIONS:
                table = self.videos
            elif os.path.isdir(entry.path):  # unlike entry.is_dir(), no error at a link to itself
                stem, table = entry.name, self.folders
            elif extension.lower() in UNREAD_EXTENSIONS:
                self.unread.append(Path(entry.path))
                continue
            else:
                continue
            found = table.setdefault(stem, Path(entry.path))
            if found != Path(entry.path):
                self.ambiguous.append((found, Path(entry.path)))

    def find(self, stem: str, video: bool) -> Path | None:
        """The mask of the picture or clip with this stem, or None."""
        tables = (self.folders, self.videos, self.stills) if video else (self.stills,)
        return next((table[stem] for table in tables if stem in table), None)

    def pairs(self, video: bool) -> list[tuple[Path, Path]]:
        """Masks of one stem: the one that is used, and another one, which is not."""
        others = (self.videos, self.stills) if video else ()
        late = [(self.find(stem, video), path) for table in others for stem, path in sorted(table.items())]
        return self.ambiguous + [(first, second) for first, second in late if first is not None and first != second]

    def stems(self, video: bool) -> dict[str, Path]:
        """Every mask by its stem: to find those that belong to no picture."""
        return {**self.stills, **self.videos, **self.folders} if video else dict(self.stills)


def mask_directories(files: Iterable[Path], images: Path, masks: Path) -> dict[Path, MaskDirectory]:
    """Reads the folder of masks for each folder of pictures that has one.

    Args:
        files: the pictures.
        images: the folder that they are in or below.
        masks: has the same sub-folders.
    """
    folders = {folder: masks / folder.relative_to(images) for folder in {file.parent for file in files}}
    return {folder: MaskDirectory(path) for folder, path in folders.items() if path.is_dir()}


def _rank(name: str) -> int:
    extension = os.path.splitext(name)[1].lower()
    return MASK_EXTENSIONS.index(extension) if extension in MASK_EXTENSIONS else len(MASK_EXTENSIONS)


def read_still(candidates: list[Candidate]) -> tuple[np.ndarray | None, Candidate | None]:
    """The first mask among the candidates of a picture, as (H, W) uint8 in its own size, and where it was.

    An alpha channel that is opaque everywhere is passed over. (None, None) when nothing is left: full weight.

    Raises:
        UserError: naming the file that cannot be read.
    """
    for candidate in candidates:
        if candidate.kind == "alpha":
            alpha = read_alpha(candidate.path, exif=False)
            if alpha is None or opaque(alpha):
                continue
            return to_uint8(alpha), candidate
        return to_uint8(read_mask_file(candidate.path, exif=False)), candidate
    return None, None


def aspect_differs(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two (width, height) differ in aspect ratio by more than 1%.

    Up to 2% passes where it is less than one pixel of the smaller one: its sides had to be rounded.
    """
    (w1, h1), (w2, h2) = sorted((first, second))
    difference = abs((w1 * h2) / (h1 * w2) - 1)
    rounded = min(abs(h1 - w1 * h2 / w2), abs(w1 - h1 * w2 / h2)) < 1
    return difference > (2 * MAX_ASPECT_DIFFERENCE if rounded else MAX_ASPECT_DIFFERENCE)


def align_to_picture(
    mask: np.ndarray, size: tuple[int, int], mask_path: Path, picture_path: Path | None, shared: bool = False
) -> np.ndarray:
    """Brings a mask to the stored pixels of its picture.

    The trainer does not turn pictures upright; a mask that was made from the upright picture is turned back. A mask of
    another size but the same shape is resized.

    Args:
        mask: (H, W) uint8.
        size: (width, height) of the picture as it is stored.
        mask_path: the mask's file, for the error.
        picture_path: the picture, whose EXIF orientation is read when shapes disagree; None when it is not known.
        shared: the mask is the default one of many pictures: it is stretched to whatever shape they have.

    Raises:
        UserError: naming both files, when their aspect ratios differ by more than 1%.
    """
    if not shared and aspect_differs((mask.shape[1], mask.shape[0]), size):
        orientation = exif_orientation(picture_path) if picture_path is not None else 1
        if orientation >= 5 and not aspect_differs((mask.shape[0], mask.shape[1]), size):
            mask = _turn_back(mask, orientation)
        else:
            picture = f"{picture_path} is" if picture_path is not None else "its picture was"
            raise UserError(
                f"{mask_path} is {mask.shape[1]}x{mask.shape[0]} but {picture} {size[0]}x{size[1]}: aspect ratios differ "
                "by more than 1%; make the mask from the same picture, uncropped"
            )
    if (mask.shape[1], mask.shape[0]) == size:
        return np.ascontiguousarray(mask)
    import cv2

    smaller = size[0] < mask.shape[1]
    return cv2.resize(np.ascontiguousarray(mask), size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


def _turn_back(mask: np.ndarray, orientation: int) -> np.ndarray:
    """From upright to stored pixels, for the orientations that exchange width and height."""
    if orientation in (5, 7):
        return mask.T if orientation == 5 else np.rot90(mask, 2).T
    return np.rot90(mask, 1 if orientation == 6 else -1)


def exif_orientation(path: Path) -> int:
    """The EXIF orientation of a picture, 1 to 8; 1 where there is none or the picture cannot be read."""
    try:
        with open_image(path) as image:
            orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except UserError:
        return 1
    return orientation if orientation in range(1, 9) else 1
