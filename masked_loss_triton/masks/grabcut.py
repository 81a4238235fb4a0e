"""OpenCV's GrabCut, for the masks of the demo and of `generate`: the same labels give the same mask."""

from __future__ import annotations

import cv2
import numpy as np


def grab_cut(picture: np.ndarray, labels: np.ndarray, rounds: int) -> np.ndarray:
    """Decides the probable pixels, then closes gaps, removes specks and parts below a tenth of the largest, and fills holes.

    Args:
        picture: (H, W, 3) uint8, RGB.
        labels: (H, W) uint8 of cv2.GC_BGD, GC_FGD, GC_PR_BGD, GC_PR_FGD; changed in place.
        rounds: of the algorithm.

    Returns:
        (H, W) uint8, 1 for the subject.
    """
    subject = np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD))
    # It needs both kinds: in a picture of a few pixels the margin can round to nothing.
    if subject.any() and not subject.all():
        cv2.setRNGSeed(0)
        background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
        bgr = np.ascontiguousarray(picture[..., ::-1])
        cv2.grabCut(bgr, labels, (0, 0, 1, 1), background, foreground, rounds, cv2.GC_INIT_WITH_MASK)
    return _tidied(np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8))


def _tidied(found: np.ndarray) -> np.ndarray:
    found = cv2.morphologyEx(found, cv2.MORPH_CLOSE, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (9, 9)))
    found = cv2.morphologyEx(found, cv2.MORPH_OPEN, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5)))
    outlines, _ = cv2.findContours(found, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    areas = [cv2.contourArea(outline) for outline in outlines]
    kept = [outline for outline, area in zip(outlines, areas, strict=True) if area >= 0.1 * max(areas)]
    return cv2.drawContours(np.zeros_like(found), kept, -1, 1, cv2.FILLED)
