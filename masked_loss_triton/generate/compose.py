"""From instances to one grey mask: plain pixels, no model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from masked_loss_triton.generate.backends import Box
from masked_loss_triton.generate.prompts import MaskRequest
from masked_loss_triton.masks.operations import blur, dilate


@dataclasses.dataclass(frozen=True)
class Instance:
    """One thing that was found for some words.

    mask: (H, W) bool. box: pixels. score, mask_score: what detector and segmenter think of it, 0 to 1, or None: see `Detection`
    and `Cutout`.
    """

    mask: np.ndarray
    box: Box
    score: float | None
    mask_score: float | None


def choose(instances: Sequence[Instance], request: MaskRequest, select: str) -> list[Instance]:
    """Returns the instances of one prompt that count: good and large enough, then all, the largest or the nearest one.

    Of equals the first one is taken.
    """
    left = [
        one
        for one in instances
        if good_enough(one.mask_score, request.min_mask_score)
        and one.mask.any()
        and one.mask.mean() >= request.min_size
    ]
    if select == "largest" and left:
        return [max(left, key=lambda one: int(one.mask.sum()))]
    if select == "nearest" and left:
        return [min(left, key=lambda one: _distance(one, request.reference_box))]
    return left


def good_enough(score: float | None, least: float) -> bool:
    """Whether a score is at least this; where nobody judged, it counts."""
    return score is None or score >= least


def _distance(instance: Instance, reference: Box) -> float:
    """The distance between the centres of two boxes, each coordinate a fraction of its side of the picture."""
    height, width = instance.mask.shape
    x = (instance.box[0] + instance.box[2]) / (2 * width) - (reference[0] + reference[2]) / 2
    y = (instance.box[1] + instance.box[3]) / (2 * height) - (reference[1] + reference[3]) / 2
    return math.hypot(x, y)


def compose(found: Mapping[str, Sequence[np.ndarray]], request: MaskRequest, shape: tuple[int, int]) -> np.ndarray:
    """Makes the grey mask of one picture.

    Args:
        found: the masks, (H, W) bool, of the instances that count, by their words.
        request: weights, exclusion, dilation, blur, inversion.
        shape: (H, W).

    Returns:
        (H, W) uint8.
    """
    grey = np.zeros(shape, np.uint8)
    for prompt in request.prompts:
        layer = _union(found.get(prompt.words, ()), shape)
        if layer.any():
            grey = np.maximum(grey, np.minimum(dilate(layer, request.mask_dilate), prompt.grey))
    for words in request.exclude:
        grey[_union(found.get(words, ()), shape) > 0] = 0
    grey = blur(grey, request.mask_blur)
    return 255 - grey if request.invert else grey


def _union(masks: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    union = np.zeros(shape, np.uint8)
    for mask in masks:
        union[mask] = 255
    return union
