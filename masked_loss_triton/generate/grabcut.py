"""Segments by OpenCV's GrabCut: colours inside a box against colours outside. No weights, no words, no GPU.

The same picture gives the same mask: OpenCV's random numbers are seeded before each call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from masked_loss_triton.files.parallel import default_workers
from masked_loss_triton.generate.backends import Box, Cutout
from masked_loss_triton.generate.prompts import MaskRequest

SIDE = 320  # GrabCut runs on a copy of this longest side: finer than any latent
ROUNDS, FOLLOW_ROUNDS = 5, 2
# Half axes of the ellipse in the middle of the box that is subject for certain, of the box's sides. Without it a colour that
# the subject shares with the background is lost: a dark collar before a dark wall (tests/generate/test_grabcut.py).
CORE = 0.2
SLACK = 0.04  # of the longest side: how far an edge may move from one frame of a clip to the next


def add_arguments(group: Any) -> None:
    """Adds nothing: it has no flags."""


def load(request: MaskRequest, **_: Any) -> GrabCut:
    """Makes the segmenter; there is nothing to load."""
    return GrabCut()


class GrabCut:
    """Segments by colours: see `Segmenter`."""

    remembers = False

    def __init__(self) -> None:
        self.workers = max(1, default_workers() // 4)  # it computes all the time: one thread per core

    def segment(self, pictures: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[list[Cutout]]:
        """See `Segmenter`. It does not judge itself."""
        return [
            [Cutout(cut_out_box(picture, box), None) for box in inside]
            for picture, inside in zip(pictures, boxes, strict=True)
        ]

    def follow(self, frames: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """See `Segmenter`. Each frame starts from the mask before it: only a band along its edge is decided again."""
        current = list(masks)
        yield current
        for frame in frames[1:]:
            current = [_move(frame, mask) for mask in current]
            yield current


def cut_out_box(picture: np.ndarray, box: Box) -> np.ndarray:
    """Cuts out what differs in colour from everything outside the box, the middle of the box for certain.

    Args:
        picture: (H, W, 3) uint8.
        box: left, top, right, bottom, pixels.

    Returns:
        (H, W) bool. A box of the whole picture leaves no outside to compare with: all of it.
    """
    import cv2

    small, scale = _small(picture)
    labels = np.full(small.shape[:2], cv2.GC_BGD, np.uint8)
    left, top, right, bottom = (round(edge * scale) for edge in box)
    labels[top:bottom, left:right] = cv2.GC_PR_FGD
    axes = (int((right - left) * CORE), int((bottom - top) * CORE))
    cv2.ellipse(labels, ((left + right) // 2, (top + bottom) // 2), axes, 0, 0, 360, cv2.GC_FGD, cv2.FILLED)
    return _enlarge(grab_cut(small, labels, ROUNDS), picture)


def _move(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    import cv2

    small, _ = _small(frame)
    before = cv2.resize(mask.astype(np.uint8), (small.shape[1], small.shape[0]), interpolation=cv2.INTER_AREA)
    if not before.any():
        return np.zeros_like(mask)
    radius = max(1, round(SLACK * max(small.shape)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    labels = np.where(cv2.dilate(before, disc) > 0, cv2.GC_PR_BGD, cv2.GC_BGD).astype(np.uint8)
    labels[before > 0] = cv2.GC_PR_FGD
    labels[cv2.erode(before, disc) > 0] = cv2.GC_FGD
    return _enlarge(grab_cut(small, labels, FOLLOW_ROUNDS), frame)


def _small(picture: np.ndarray) -> tuple[np.ndarray, float]:
    import cv2

    scale = min(1.0, SIDE / max(picture.shape[:2]))
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA), scale


def _enlarge(found: np.ndarray, picture: np.ndarray) -> np.ndarray:
    import cv2

    size = (picture.shape[1], picture.shape[0])
    return cv2.resize(found.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5


def grab_cut(picture: np.ndarray, labels: np.ndarray, rounds: int) -> np.ndarray:
    """Decides the probable pixels, then closes gaps, removes specks and parts below a tenth of the largest, and fills holes.

    Args:
        picture: (H, W, 3) uint8, RGB.
        labels: (H, W) uint8 of cv2.GC_BGD, GC_FGD, GC_PR_BGD, GC_PR_FGD; changed in place.
        rounds: of the algorithm.

    Returns:
        (H, W) uint8, 1 for the subject.
    """
    import cv2

    subject = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    # It needs both kinds: in a picture of a few pixels the margin can round to nothing.
    if subject.any() and not subject.all():
        cv2.setRNGSeed(0)
        background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
        bgr = np.ascontiguousarray(picture[..., ::-1])
        cv2.grabCut(bgr, labels, (0, 0, 1, 1), background, foreground, rounds, cv2.GC_INIT_WITH_MASK)
    found: Any = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    found = cv2.morphologyEx(found, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9)))
    found = cv2.morphologyEx(found, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    outlines, _ = cv2.findContours(found, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    areas = [cv2.contourArea(outline) for outline in outlines]
    kept = [outline for outline, area in zip(outlines, areas, strict=True) if area >= 0.1 * max(areas)]
    return cv2.drawContours(np.zeros_like(found), kept, -1, 1, cv2.FILLED)
