"""How much of a mask the trainer's crop cuts off, and crops that keep all of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from masked_loss_triton.masks.geometry import cover

Size = tuple[int, int]  # width, height
Box = tuple[float, float, float, float]  # left, top, right, bottom, pixels


def kept_box(size: Size, bucket: Size) -> Box:
    """Returns what the trainer keeps of a picture of this size, on its own pixels."""
    whole, (left, top) = cover(size, bucket)
    x, y = size[0] / whole[0], size[1] / whole[1]
    return left * x, top * y, (left + bucket[0]) * x, (top + bucket[1]) * y


def cut_share(mask: np.ndarray, bucket: Size, scale: tuple[float, float] = (1.0, 1.0)) -> float:
    """Returns how much of a mask's weight the trainer's crop cuts off, 0 to 1; 0 for a black mask.

    Args:
        mask: (H, W) of any dtype, on the pixels of its picture.
        bucket: of the picture.
        scale: the picture's width and height by those of the mask, where it is smaller or larger.
    """
    height, width = mask.shape
    kept = kept_box((round(width * scale[0]), round(height * scale[1])), bucket)
    left, right, top, bottom = kept[0] / scale[0], kept[2] / scale[0], kept[1] / scale[1], kept[3] / scale[1]
    total = float(mask.sum(dtype=np.float64))
    inside = _covered(height, top, bottom) @ mask.astype(np.float64) @ _covered(width, left, right)
    return max(0.0, 1 - float(inside) / total) if total else 0.0


def _covered(length: int, first: float, last: float) -> np.ndarray:
    """How much of each of `length` pixels is between two places, 0 to 1."""
    edges = np.arange(length + 1, dtype=np.float64).clip(first, last)
    return np.diff(edges)


def crop_around(mask: np.ndarray, buckets: Sequence[Size], margin: float, enlarge: bool = False) -> tuple[Box, Size]:
    """Chooses the smallest crop that has the whole mask in it and the shape of a bucket.

    It is not smaller than its bucket where the picture is large enough, so that nothing is enlarged without need. Where the
    mask is too long for any bucket's shape within the picture, the crop reaches beyond the picture.

    Args:
        mask: (H, W) uint8, not black.
        buckets: of the trainer.
        margin: around the mask, of its longer side; less where the picture ends.
        enlarge: let it be smaller than its bucket: who asks for a face wants to see it close.

    Returns:
        The crop in pixels of the picture, and its bucket.
    """
    height, width = mask.shape
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    first, last = (int(xs[0]), int(ys[0])), (int(xs[-1]) + 1, int(ys[-1]) + 1)
    around = margin * max(last[0] - first[0], last[1] - first[1])
    left, top = (max(0.0, edge - around) for edge in first)
    right, bottom = (min(float(whole), edge + around) for edge, whole in zip(last, (width, height), strict=True))

    def sides(bucket: Size) -> tuple[float, float]:
        """The width and height of the crop for a bucket."""
        aspect = bucket[0] / bucket[1]
        across = max(right - left, (bottom - top) * aspect)
        roomy = 0.0 if enlarge else min(float(bucket[0]), width, height * aspect)
        across = max(across, roomy)
        return across, across / aspect

    def cost(bucket: Size) -> tuple[float, float, Size]:
        across, down = sides(bucket)
        beyond = max(0.0, across - width) * down + max(0.0, down - height) * across
        return beyond, across * down, bucket

    bucket = min(buckets, key=cost)
    across, down = sides(bucket)
    x, y = _place(left, right, across, width), _place(top, bottom, down, height)
    return (x, y, x + across, y + down), bucket


def _place(first: float, last: float, length: float, whole: int) -> float:
    """Where a crop of this length begins: around the middle of what it has to hold, inside the picture where it fits."""
    if length >= whole:
        return (whole - length) / 2
    return min(max((first + last - length) / 2, 0.0), whole - length)


def cut(array: np.ndarray, box: Box, bucket: Size, fill: str = "edge") -> np.ndarray:
    """Cuts a crop out of a picture or mask and scales it to its bucket.

    Args:
        array: (H, W) or (H, W, 3) uint8.
        box: of `crop_around`.
        bucket: (width, height).
        fill: what stands beyond the picture: "edge" repeats its border, "constant" is black.

    Returns:
        (height, width[, 3]) uint8.
    """
    height, width = array.shape[:2]
    before = max(0, int(np.ceil(-box[0]))), max(0, int(np.ceil(-box[1])))
    after = max(0, int(np.ceil(box[2] - width))), max(0, int(np.ceil(box[3] - height)))
    if any((*before, *after)):
        sides = [(before[1], after[1]), (before[0], after[0]), (0, 0)][: array.ndim]
        array = np.pad(array, sides, mode=fill)  # type: ignore[call-overload]
    x0, y0 = box[0] + before[0], box[1] + before[1]
    # Rounding must not place the box beyond the picture.
    region = (
        max(0.0, x0),
        max(0.0, y0),
        min(float(array.shape[1]), x0 + box[2] - box[0]),
        min(float(array.shape[0]), y0 + box[3] - box[1]),
    )
    enlarged = bucket[0] > region[2] - region[0]
    how = Image.Resampling.LANCZOS if enlarged else Image.Resampling.BOX
    return np.asarray(Image.fromarray(array).resize(bucket, how, box=region))
