"""The demo's photographs: pictures that scikit-learn and scikit-image ship, or a folder of the user's.

Nothing is downloaded: the files are looked up inside the installed packages, whose download helpers are never called.
A photograph without a mask gets one by OpenCV's GrabCut, from a rectangle round the subject.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.grabcut import grab_cut

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom excluded

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MAX_PHOTOS = 12  # more would not be learned in the demo's few hundred steps
MASK_SUFFIX = "_mask"  # a user's cat.jpg may have cat_mask.png beside it
GRABCUT_SIDE = 320  # GrabCut runs on a copy of this longest side: finer than any latent, and ten times as fast
GRABCUT_ROUNDS = 5
CENTRAL_MARGIN = 0.08  # of each side: the rectangle assumed for a photograph nobody drew one for


@dataclass(frozen=True)
class Photo:
    """One photograph and what is known about its subject.

    rgb: uint8 (H, W, 3). alpha: float32 (H, W) in [0, 1], or None where GrabCut has to find it.
    box: GrabCut's rectangle, None for the central one. sure: parts that belong to the subject for certain.
    """

    name: str
    rgb: np.ndarray
    alpha: np.ndarray | None = None
    box: Box | None = None
    sure: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Shipped:
    """A photograph inside an installed package: the square to cut out of it, then rectangles within that square."""

    package: str
    path: str
    crop: Box
    box: Box
    sure: tuple[Box, ...] = ()


SUBJECTS = {
    "astronaut": Shipped(
        "skimage",
        "data/astronaut.png",
        crop=(0, 0, 512, 512),
        box=(40, 10, 380, 505),
        # The collar is dark and would be cut out, leaving a floating head.
        sure=((150, 170, 280, 230), (90, 330, 250, 480)),
    ),
    "coffee": Shipped("skimage", "data/coffee.png", crop=(80, 0, 480, 400), box=(5, 15, 395, 380)),
    "flower": Shipped("sklearn", "datasets/images/flower.jpg", crop=(90, 0, 517, 427), box=(70, 75, 360, 370)),
    "pagoda": Shipped("sklearn", "datasets/images/china.jpg", crop=(35, 0, 462, 427), box=(20, 20, 335, 365)),
}

# What the base model sees before any LoRA: other pictures, so that the subjects and their backgrounds are both new to it.
WORLD = (
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coins.png",
    "color.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)


def _shipped_file(package: str, path: str) -> Path:
    # find_spec does not import the package: both take a second to import and none of their code is needed.
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise UserError(f"the demo's photographs come with {distribution}: pip install 'masked_loss_triton[demo]'", 2)
    file = Path(spec.origin).parent / path
    if not file.is_file():
        raise UserError(f"{file.name} is missing from the installed package {package!r}: install it again")
    return file


def _read_rgb(file: Path) -> np.ndarray:
    picture = cv2.imread(str(file), cv2.IMREAD_COLOR_RGB)
    if picture is None:
        raise UserError(f"{file} cannot be read as a picture")
    return picture


def shipped_photos() -> list[Photo]:
    """The subjects, cut out square, each with GrabCut's rectangle. Reads files only."""
    photos = []
    for name, shipped in SUBJECTS.items():
        left, top, right, bottom = shipped.crop
        rgb = _read_rgb(_shipped_file(shipped.package, shipped.path))[top:bottom, left:right]
        photos.append(Photo(name, np.ascontiguousarray(rgb), box=shipped.box, sure=shipped.sure))
    return photos


def world_pictures() -> list[tuple[str, np.ndarray]]:
    """(name, uint8 (H, W, 3)) of the pictures that the base model is trained on."""
    return [(name.split(".")[0], _read_rgb(_shipped_file("skimage", f"data/{name}"))) for name in WORLD]


def find_subject(photo: Photo) -> np.ndarray:
    """A soft mask of the subject by GrabCut, tidied up: no specks, no holes, an edge one or two pixels wide.

    Deterministic: OpenCV's random numbers are seeded before each picture.

    Returns:
        float32 (H, W) in [0, 1]; all 0 where GrabCut finds nothing.
    """
    height, width = photo.rgb.shape[:2]
    scale = min(1.0, GRABCUT_SIDE / max(height, width))
    small = cv2.resize(photo.rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    labels = np.full(small.shape[:2], cv2.GC_BGD, np.uint8)
    box = photo.box or _central_box(height, width)
    _paint(labels, box, scale, cv2.GC_PR_FGD)
    for part in photo.sure:
        _paint(labels, part, scale, cv2.GC_FGD)
    found = grab_cut(small, labels, GRABCUT_ROUNDS)
    mask = cv2.resize(found.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.clip(cv2.GaussianBlur(mask, (5, 5), 0), 0, 1)


def _central_box(height: int, width: int) -> Box:
    x, y = round(width * CENTRAL_MARGIN), round(height * CENTRAL_MARGIN)
    return x, y, width - x, height - y


def _paint(labels: np.ndarray, box: Box, scale: float, label: int) -> None:
    left, top, right, bottom = (round(edge * scale) for edge in box)
    labels[top:bottom, left:right] = label
