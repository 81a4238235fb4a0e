"""Pictures and clips of coloured shapes on noisy grounds, with the masks of the shapes: what the tiny models here are trained on.

A seed that a model was not trained with gives pictures that it has not seen.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

COLOURS = {"red": (210, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (225, 205, 50)}
SHAPES = ("square", "circle", "triangle")
Box = tuple[int, int, int, int]  # left, top, right, bottom, pixels, right and bottom excluded


@dataclasses.dataclass(frozen=True)
class Thing:
    """A shape in a picture: its colour and shape by name, the box it is drawn in, and its pixels, (H, W) bool."""

    colour: str
    shape: str
    box: Box
    mask: np.ndarray


def draw(side: int, shape: str, box: Box) -> np.ndarray:
    """The pixels of a shape, (side, side) bool; of a box that is partly outside, what is inside."""
    left, top, right, bottom = box
    mask = np.zeros((side, side), np.uint8)
    if shape == "square":
        mask[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = 1
    elif shape == "circle":
        centre, sides = ((left + right - 1) / 2, (top + bottom - 1) / 2), (right - left - 1, bottom - top - 1)
        cv2.ellipse(mask, (centre, sides, 0), 1, -1)
    else:
        corners = np.array([[(left + right) // 2, top], [right - 1, bottom - 1], [left, bottom - 1]], np.int32)
        cv2.fillPoly(mask, [corners], 1)
    return mask > 0


def ground(rng: np.random.Generator, side: int) -> np.ndarray:
    """A grey ground of soft patches, (side, side, 3) float32."""
    rows, columns = rng.integers(2, 7, 2)
    patches = np.repeat(rng.uniform(60, 200, (rows, columns, 1)), 3, axis=2) + rng.normal(0, 12, 3)
    return cv2.resize(patches.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC)


def boxes_apart(rng: np.random.Generator, side: int, count: int, smallest: float, largest: float) -> list[Box]:
    """Boxes that do not overlap, their sides between two fractions of the picture's."""
    while True:
        boxes: list[Box] = []
        for _ in range(30 * count):
            width, height = (int(rng.uniform(smallest, largest) * side) for _ in range(2))
            left, top = (int(rng.integers(0, side - length + 1)) for length in (width, height))
            box = (left, top, left + width, top + height)
            if all(box[2] <= o[0] or box[0] >= o[2] or box[3] <= o[1] or box[1] >= o[3] for o in boxes):
                boxes.append(box)
            if len(boxes) == count:
                return boxes


def scene(rng: np.random.Generator, side: int, count: int = 2) -> tuple[np.ndarray, list[Thing]]:
    """A picture, (side, side, 3) uint8, and the things in it, no two alike and none over another."""
    frames, things = clip(rng, side, 1, count)
    return frames[0], things[0]


def clip(
    rng: np.random.Generator, side: int, length: int, count: int = 2, fastest: float = 0.06
) -> tuple[list[np.ndarray], list[list[Thing]]]:
    """Frames, (side, side, 3) uint8, and the things in each, in one order. Each thing moves in a line of its own and comes back
    at the edges, and may pass before another that was drawn earlier.

    Args:
        rng: of everything in it.
        side: of the picture.
        length: frames.
        count: of things.
        fastest: way of a thing from frame to frame, as a fraction of the picture's side.
    """
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    chosen = [kinds[index] for index in rng.permutation(len(kinds))[:count]]
    boxes = boxes_apart(rng, side, count, 0.28, 0.55)
    speeds = rng.uniform(-fastest, fastest, (count, 2)) * side
    tints = [np.array(COLOURS[colour]) + rng.normal(0, 12, 3) for colour, _ in chosen]
    back = ground(rng, side)
    frames, things = [], []
    for number in range(length):
        picture = back + rng.normal(0, 8, back.shape)
        present: list[Thing] = []
        for (colour, shape), box, speed, tint in zip(chosen, boxes, speeds, tints, strict=True):
            moved = _moved(box, speed * number, side)
            mask = draw(side, shape, moved)
            picture[mask] = tint + rng.normal(0, 14, (int(mask.sum()), 3))
            present = [dataclasses.replace(one, mask=one.mask & ~mask) for one in present]
            present.append(Thing(colour, shape, moved, mask))
        frames.append(np.clip(picture, 0, 255).astype(np.uint8))
        things.append(present)
    return frames, things


def _moved(box: Box, way: np.ndarray, side: int) -> Box:
    """A box after a way, mirrored at the edges of the picture."""
    places = []
    for first, last, along in ((box[0], box[2], way[0]), (box[1], box[3], way[1])):
        room = side - (last - first)
        place = (first + along) % (2 * room) if room else 0
        places.append(round(min(place, 2 * room - place)))
    left, top = places
    return left, top, left + box[2] - box[0], top + box[3] - box[1]


def iou(one: np.ndarray, other: np.ndarray) -> float:
    """Of two (H, W) bool; 1 for two that are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0
