"""Runs a detector and a segmenter on pictures and clips, and makes masks of what they find."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from masked_loss_triton.generate.backends import Detector, Segmenter
from masked_loss_triton.generate.compose import Instance, choose, compose, good_enough
from masked_loss_triton.generate.prompts import MaskRequest

Found = dict[str, list[Instance]]  # by words; words without an instance are not in it


@dataclasses.dataclass(frozen=True)
class FrameMask:
    """The mask of a picture or frame, (H, W) uint8, and what it was made of: for a frame of a clip, what its key frame had."""

    mask: np.ndarray
    found: Found

    def found_any(self, request: MaskRequest) -> bool:
        """Whether any prompt was found; exclusions do not count."""
        return any(prompt.words in self.found for prompt in request.prompts)

    @property
    def detected(self) -> bool:
        """Whether a detector had any of it: a box that was given is not detected."""
        return any(one.score is not None for instances in self.found.values() for one in instances)


class Engine:
    """Finds instances, chooses among them and composes masks; keeps nothing of a picture.

    Args:
        detector, segmenter: the models.
        request: what is looked for, and how it becomes a mask.
        key_interval: clips are looked at anew every so many frames.
    """

    def __init__(self, detector: Detector, segmenter: Segmenter, request: MaskRequest, key_interval: int) -> None:
        self.detector, self.segmenter, self.request = detector, segmenter, request
        self.key_interval = key_interval

    def find(self, pictures: Sequence[np.ndarray]) -> list[Found]:
        """Finds what is in each picture, (H, W, 3) uint8, and chooses the instances that count."""
        words = self.request.words
        detections = [
            [[one for one in found if good_enough(one.score, self.request.min_score)] for found in by_words]
            for by_words in self.detector.detect(pictures, words)
        ]
        flat = [[one for found in by_words for one in found] for by_words in detections]
        cutouts = self.segmenter.segment(pictures, [[one.box for one in boxes] for boxes in flat])
        results = []
        for by_words, masks in zip(detections, cutouts, strict=True):
            left = iter(masks)
            found: Found = {}
            for one, boxes in zip(words, by_words, strict=True):
                instances = []
                for detection in boxes:
                    cutout = next(left)
                    instances.append(Instance(cutout.mask, detection.box, detection.score, cutout.score))
                select = "all" if one in self.request.exclude else self.request.select
                if chosen := choose(instances, self.request, select):
                    found[one] = chosen
            results.append(found)
        return results

    nothing = ""
    judged = True

    @property
    def workers(self) -> int:
        """The number of batches that are worth working on at once."""
        return self.segmenter.workers

    def masks(self, pictures: Sequence[np.ndarray], sources: Sequence[Path] = ()) -> list[FrameMask]:
        """Makes the mask of each picture, (H, W, 3) uint8. Their files do not matter here."""
        return [
            FrameMask(compose(_masks(found), self.request, picture.shape[:2]), found)
            for picture, found in zip(pictures, self.find(pictures), strict=True)
        ]

    def masks_of_clip(self, frames: Iterable[np.ndarray], source: Path | None = None) -> Iterator[FrameMask]:
        """Makes the mask of each frame, in order.

        Every `key_interval` frames, and in the last one, things are found anew; in between they are followed from the key
        frame before. What only the key frame after has is followed backwards from there. At most `key_interval` + 1
        frames are in memory.
        """
        waiting = iter(frames)
        first = next(waiting, None)
        if first is None:
            return
        found = self.find([first])[0]
        while True:
            chunk = [first]
            for frame in waiting:
                chunk.append(frame)
                if len(chunk) > self.key_interval:
                    break
            if len(chunk) == 1:
                yield FrameMask(compose(_masks(found), self.request, first.shape[:2]), found)
                return
            after = self.find([chunk[-1]])[0]
            # The last frame of the chunk begins the next one, or ends the clip there with what was found in it.
            for by_words in self._between(chunk, found, after):
                yield FrameMask(compose(by_words, self.request, first.shape[:2]), found)
            first, found = chunk[-1], after

    def _between(self, chunk: list[np.ndarray], before: Found, after: Found) -> Iterator[dict[str, list[np.ndarray]]]:
        """The masks of all frames of a chunk but its last one, by words. Joins what is remembered there to `after`."""
        new = {words: instances for words, instances in after.items() if words not in before}
        backwards = list(self._follow(chunk[::-1], new))[:0:-1] if new else [{}] * (len(chunk) - 1)
        followed = self._follow(chunk if self.segmenter.remembers else chunk[:-1], before)
        for back in backwards:
            yield {**next(followed), **back}
        for remembered in followed:
            _join(after, remembered)

    def _follow(self, frames: list[np.ndarray], found: Found) -> Iterator[dict[str, list[np.ndarray]]]:
        if not found:
            yield from ({} for _ in frames)
            return
        owners = [words for words, instances in found.items() for _ in instances]
        first = [one.mask for instances in found.values() for one in instances]
        for masks in self.segmenter.follow(frames, first):
            by_words: dict[str, list[np.ndarray]] = {}
            for words, mask in zip(owners, masks, strict=True):
                by_words.setdefault(words, []).append(mask)
            yield by_words


class WholeEngine:
    """Finds and cuts out in one, from a picture and files that belong to it; takes the place of an `Engine`."""

    workers = 2
    judged = False  # whether its masks are looked at for what is odd about them
    nothing = ""  # why nothing was found, where there is one reason

    def __init__(self, request: MaskRequest) -> None:
        self.request = request

    def find(self, picture: np.ndarray, source: Path) -> Found:
        """Finds what is in a picture, (H, W, 3) uint8, whose file is `source`."""
        raise NotImplementedError

    def masks(self, pictures: Sequence[np.ndarray], sources: Sequence[Path]) -> list[FrameMask]:
        """Makes the mask of each picture, (H, W, 3) uint8."""
        return [
            self.mask_of(picture, self.find(picture, source)) for picture, source in zip(pictures, sources, strict=True)
        ]

    def masks_of_clip(self, frames: Iterable[np.ndarray], source: Path) -> Iterator[FrameMask]:
        """Makes the mask of each frame, in order."""
        raise NotImplementedError

    def one_instance(self, mask: np.ndarray) -> Found:
        """Makes one instance of a mask, (H, W) bool, where it is large enough. Nobody scores it: it was computed."""
        ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        if not len(ys):
            return {}
        box = float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)
        chosen = choose([Instance(mask, box, 1.0, None)], self.request, "all")
        return {self.request.prompts[0].words: chosen} if chosen else {}

    def mask_of(self, picture: np.ndarray, found: Found) -> FrameMask:
        """Makes the mask of what was found."""
        return FrameMask(compose(_masks(found), self.request, picture.shape[:2]), found)


def _join(found: Found, remembered: dict[str, list[np.ndarray]]) -> None:
    """Adds each mask to the instance of the same words that it overlaps most, where it overlaps one."""
    for words, masks in remembered.items():
        instances = found.get(words, [])
        for mask in masks:
            shared = [int((one.mask & mask).sum()) for one in instances]
            if any(shared):
                most = shared.index(max(shared))
                instances[most] = dataclasses.replace(instances[most], mask=instances[most].mask | mask)


def _masks(found: Found) -> dict[str, list[np.ndarray]]:
    return {words: [one.mask for one in instances] for words, instances in found.items()}
