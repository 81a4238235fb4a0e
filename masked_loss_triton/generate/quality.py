"""Marks of masks that deserve a look: numbers that good masks seldom have. They are hints; nobody has judged the mask."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from masked_loss_triton.generate.backends import WHOLE, Box
from masked_loss_triton.generate.jobs import Job
from masked_loss_triton.generate.mask_files import read_note
from masked_loss_triton.masks.frames import read_frames, to_uint8

SIDE = 320  # longest side of the copies on which outlines are compared with edges
LEAST_AREA, MOST_AREA = 0.003, 0.95  # of the picture
FILLED = 0.3  # of a side of the box: a mask that has so much of all four was not cut out of it
EDGY = 0.75  # of the outline: seen were 0.89 and more in good masks before a sharp background
SURE = 0.5  # a score below it
ALIKE = 0.6  # IoU of a mask and what stands out
STEADY = 0.7  # IoU of the masks of two frames that follow each other


def picture_marks(
    picture: np.ndarray,
    mask: np.ndarray,
    given: Sequence[Box] = (),
    scores: Sequence[float] = (),
    salience: np.ndarray | None = None,
) -> list[str]:
    """Returns what is odd about the mask of a picture, one short sentence each.

    Args:
        picture: (H, W, 3) uint8.
        mask: (H, W) bool.
        given: boxes that were given and not detected.
        scores: of detector and segmenter, for each thing that was found.
        salience: (H, W) bool, what stands out in the picture, to compare with; None compares nothing.
    """
    marks = []
    area = float(mask.mean())
    if not LEAST_AREA <= area <= MOST_AREA:
        marks.append(f"it covers {area:.1%} of the picture")
    if any(_fills(mask, box) for box in given):
        marks.append("it reaches all four sides of its box: nothing was cut out")
    follows = on_edges(picture, mask)
    if follows < EDGY:
        marks.append(f"only {follows:.0%} of its outline is on edges of the picture")
    if scores and min(scores) < SURE:
        marks.append(f"a score of {min(scores):.2f}")
    if salience is not None and (alike := overlap(mask, salience)) < ALIKE:
        marks.append(f"it is not what stands out (IoU {alike:.2f})")
    return marks


def clip_marks(masks: Iterable[np.ndarray]) -> list[str]:
    """Returns what is odd about the masks of a clip, (H, W) bool each: frames where it jumps, and frames without it."""
    worst, where, empty, count = 1.0, 0, 0, 1
    iterator = iter(masks)
    first = next(iterator, None)
    if first is None:
        return []
    empty = int(not first.any())
    for number, (before, after) in enumerate(itertools.pairwise(itertools.chain((first,), iterator)), 1):
        count, empty = count + 1, empty + int(not after.any())
        if before.any() and after.any() and (alike := overlap(before, after)) < worst:
            worst, where = alike, number
    marks = []
    if worst < STEADY:
        marks.append(f"it jumps at frame {where} (IoU {worst:.2f} with the frame before)")
    if 0 < empty < count:
        marks.append(f"it is gone in {empty} of {count} frames")
    return marks


def marks_of_clip(mask: Path) -> list[str]:
    """What is odd about the masks of a clip. One that somebody else made, that is computed or has intervals has no marks."""
    note = read_note(mask)
    if note is None or note["backend"] in WHOLE or note.get("intervals"):
        return []
    return clip_marks(to_uint8(frame) > 127 for frame in read_frames(mask))


def marks_of(job: Job) -> list[str]:
    """What is odd about the mask that a job has now."""
    mask = job.mask()
    if mask is None:
        return []
    return marks_of_clip(mask) if job.is_clip else list((read_note(mask) or {}).get("marks", ()))


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Intersection over union of two masks, (H, W) bool; 1 for two empty ones."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else 1.0


def on_edges(picture: np.ndarray, mask: np.ndarray) -> float:
    """The share of a mask's outline, the picture's border left out, with an edge that is stronger than the picture's median one
    within two pixels; 1 without an outline."""
    import cv2

    scale = min(1.0, SIDE / max(mask.shape))
    size = (max(1, round(mask.shape[1] * scale)), max(1, round(mask.shape[0] * scale)))
    small = cv2.GaussianBlur(cv2.resize(picture, size, interpolation=cv2.INTER_AREA).astype(np.float32), (0, 0), 1)
    gradient = np.hypot(cv2.Sobel(small, cv2.CV_32F, 1, 0), cv2.Sobel(small, cv2.CV_32F, 0, 1)).max(axis=2)
    strongest = cv2.dilate(gradient, np.ones((5, 5)))
    shape = (cv2.resize(mask.astype(np.uint8) * 255, size, interpolation=cv2.INTER_AREA) > 127).astype(np.uint8)
    outline = cv2.morphologyEx(shape, cv2.MORPH_GRADIENT, np.ones((3, 3))) > 0
    for edge in (np.s_[:2], np.s_[-2:], np.s_[:, :2], np.s_[:, -2:]):
        outline[edge] = False
    return float((strongest[outline] > np.median(strongest)).mean()) if outline.any() else 1.0


def _fills(mask: np.ndarray, box: Box) -> bool:
    """Whether the mask has a good part of the pixels along each side of the box."""
    height, width = mask.shape
    left, top = max(0, round(box[0])), max(0, round(box[1]))
    inside = mask[top : min(height, round(box[3])), left : min(width, round(box[2]))]
    if min(inside.shape) < 8:
        return False
    near = max(1, min(inside.shape) // 40)  # the segmenter works on a smaller copy
    sides = (inside[:near].any(0), inside[-near:].any(0), inside[:, :near].any(1), inside[:, -near:].any(1))
    return all(side.mean() > FILLED for side in sides)
