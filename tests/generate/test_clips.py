"""Key frames, and what is followed from where: a detector and a segmenter that can be computed by hand."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from masked_loss_triton.generate.backends import Cutout, Detection
from masked_loss_triton.generate.engine import Engine
from masked_loss_triton.generate.prompts import MaskRequest, Prompt

COLOURS = {"red": 0, "green": 1, "blue": 2}
SHAPE = (4, 12)


class Colours:
    """Finds the pixels of a colour channel, and remembers the frames that it was shown."""

    def __init__(self) -> None:
        self.shown: list[int] = []

    def detect(self, pictures, words) -> list[list[list[Detection]]]:
        self.shown += [int(picture[0, 0, 0]) for picture in pictures]
        return [[self._boxes(picture, COLOURS[one]) for one in words] for picture in pictures]

    def _boxes(self, picture, channel) -> list[Detection]:
        columns = np.flatnonzero(picture[1:, :, channel].max(axis=0) > 100)
        return [Detection((float(column), 1, column + 1.0, SHAPE[0]), 0.9) for column in columns]


class Columns:
    """Cuts out the column of the box. Following moves it one to the right in each frame, or to the left when time runs back."""

    workers = 1
    remembers = False

    def __init__(self) -> None:
        self.longest = 0

    def segment(self, pictures, boxes) -> list[list[Cutout]]:
        return [[Cutout(column(int(box[0])), 0.9) for box in inside] for inside in boxes]

    def follow(self, frames, masks) -> Iterator[list[np.ndarray]]:
        self.longest = max(self.longest, len(frames))
        step = 1 if len(frames) < 2 or frames[1][0, 0, 0] > frames[0][0, 0, 0] else -1
        for number in range(len(frames)):
            yield [np.roll(mask, step * number, axis=1) for mask in masks]


def column(x: int) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[1:, x] = True
    return mask


def clip(length: int, **where) -> list[np.ndarray]:
    """Frames whose first pixel is their number; each colour is a column that goes right by one a frame, in these frames."""
    frames = []
    for t in range(length):
        frame = np.zeros((*SHAPE, 3), np.uint8)
        frame[0, 0] = t
        for colour, (first, last) in where.items():
            if first <= t <= last:
                frame[1:, t, COLOURS[colour]] = 200
        frames.append(frame)
    return frames


def run(frames, interval, segmenter=None, **options):
    options.setdefault("prompts", (Prompt("red", 1.0), Prompt("green", 0.5)))
    detector, segmenter = Colours(), segmenter or Columns()
    results = list(Engine(detector, segmenter, MaskRequest(**options), interval).masks_of_clip(iter(frames)))
    assert len(results) == len(frames)
    assert segmenter.longest <= interval + 1
    return [result.mask for result in results], detector, results


def expected(x: int | None, grey: int = 255) -> np.ndarray:
    return column(x) * np.uint8(grey) if x is not None else np.zeros(SHAPE, np.uint8)


@pytest.mark.parametrize(
    ("length", "interval", "keys"),
    [
        (1, 4, [0]),
        (2, 4, [0, 1]),
        (5, 4, [0, 4]),
        (6, 4, [0, 4, 5]),
        (12, 4, [0, 4, 8, 11]),
        (4, 1, [0, 1, 2, 3]),
    ],
)
def test_things_are_looked_for_in_key_frames_and_the_last_one(length, interval, keys):
    masks, detector, _ = run(clip(length, red=(0, 11)), interval)
    assert detector.shown == keys
    for t, mask in enumerate(masks):
        assert np.array_equal(mask, expected(t)), t


def test_what_appears_between_key_frames_is_followed_backwards():
    masks, _, results = run(clip(9, red=(6, 8)), 4)
    # Found in frame 8 and not in frame 4: followed back as far as the frame after that key frame's own.
    for t, mask in enumerate(masks):
        assert np.array_equal(mask, expected(t if t >= 4 else None)), t
    assert [result.found_any(MaskRequest(prompts=(Prompt("red"),))) for result in results] == [False] * 8 + [True]


def test_each_thing_has_its_own_direction():
    masks, _, _ = run(clip(5, red=(0, 1), green=(3, 4)), 4)
    both = [np.maximum(expected(t), expected(t, 128)) for t in range(4)]
    assert all(np.array_equal(mask, one) for mask, one in zip(masks, both, strict=False))
    assert np.array_equal(masks[4], expected(4, 128)), "the red one is no longer there in the last key frame"


class Wide(Columns):
    """Remembers one more column on the left than it cuts out."""

    remembers = True

    def follow(self, frames, masks) -> Iterator[list[np.ndarray]]:
        for number, followed in enumerate(super().follow(frames, masks)):
            yield [mask | np.roll(mask, -min(number, 1), axis=1) for mask in followed]


def test_what_is_remembered_joins_what_is_found_anew_where_they_overlap():
    masks, _, results = run(clip(9, red=(0, 4), green=(8, 8)), 4, Wide())
    assert np.array_equal(masks[4], expected(4) | expected(3)), "found in this key frame, and remembered from before"
    assert [instance.mask.sum() for instance in results[4].found["red"]] == [2 * (SHAPE[0] - 1)]
    assert np.array_equal(masks[8], expected(8, 128)), "red is remembered, but no longer found: it is not brought back"


def test_exclusion_holds_in_every_frame():
    prompts = (Prompt("red"),)
    masks, _, _ = run(clip(6, red=(0, 5), blue=(0, 5)), 3, prompts=prompts, exclude=("blue",))
    assert not any(mask.any() for mask in masks)


def test_an_empty_clip_has_no_masks():
    assert run([], 4)[0] == []
