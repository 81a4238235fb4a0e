"""One batch of pictures, or one clip, from files to files. Whatever goes wrong is told of the file it went wrong with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.engine import Engine, Result
from masked_loss_triton.generate.jobs import Job
from masked_loss_triton.generate.writing import remove_mask, write_frames, write_mask, write_video
from masked_loss_triton.masks.frames import frame_rate, read_clip
from masked_loss_triton.masks.reading import read_picture
from masked_loss_triton.masks.sources import exif_orientation

FALLBACKS = {"none": None, "black": 0, "white": 255}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one picture or clip: "written", "nothing" (no prompt was found) or "problem"; its mean weight."""

    job: Job
    status: str
    message: str = ""
    mean: float = 0.0


class _NothingFound(Exception):
    """In no frame of a clip."""


class Worker:
    """Makes masks and writes them.

    Args:
        engine: what finds them.
        settings: what is noted in every mask beside what was found.
        fallback: the grey value of a mask in which nothing was found, or None to write none.
        debug: let unexpected errors through instead of telling them as a problem of the file.
    """

    def __init__(self, engine: Engine, settings: dict[str, Any], fallback: int | None, debug: bool = False) -> None:
        self.engine, self.settings, self.fallback, self.debug = engine, settings, fallback, debug

    def run(self, batch: Sequence[Job]) -> list[Outcome]:
        """The outcomes of a batch: several pictures, or one clip."""
        if batch[0].is_clip:
            return [self._guarded(job, lambda job=job: self._clip(job)) for job in batch]
        outcomes, jobs, pictures = [], [], []
        for job in batch:
            try:
                pictures.append(read_picture(job.source).rgb)
                jobs.append(job)
            except UserError as error:
                outcomes.append(Outcome(job, "problem", str(error)))
        return outcomes + (self._pictures(jobs, pictures) if jobs else [])

    def _pictures(self, jobs: list[Job], pictures: list[np.ndarray]) -> list[Outcome]:
        if len(jobs) == 1:
            return [self._guarded(jobs[0], lambda: self._write(jobs[0], self.engine.masks(pictures)[0]))]
        try:
            results = self.engine.masks(pictures)
        except (
            Exception
        ):  # one of them spoils the batch, or all of them are too much for the memory: one by one it shows
            singles = zip(jobs, pictures, strict=True)
            return [outcome for job, picture in singles for outcome in self._pictures([job], [picture])]
        return [
            self._guarded(job, lambda job=job, result=result: self._write(job, result))
            for job, result in zip(jobs, results, strict=True)
        ]

    def _guarded(self, job: Job, work: Any) -> Outcome:
        try:
            return work()
        except UserError as error:
            return Outcome(job, "problem", str(error))
        except Exception as error:
            # A night's run must not end at one picture that a model or a codec cannot take.
            if self.debug:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            return Outcome(job, "problem", f"{job.source}: {type(error).__name__}: {reason} (--debug shows where)")

    def _write(self, job: Job, result: Result) -> Outcome:
        mask, note, status = result.mask, self._note(result), "written"
        if not result.something(self.engine.options):
            status = "nothing"
            if self.fallback is None:
                clear_old(job)
                return Outcome(job, status)
            mask, note = np.full_like(mask, self.fallback), {**note, "fallback": True}
        write_mask(job.target, mask, note, exif_orientation(job.source))
        return Outcome(job, status, mean=float(mask.mean()) / 255)

    def _clip(self, job: Job) -> Outcome:
        means: list[float] = []

        def masks() -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
            something = False
            for result in self.engine.masks_of_clip(read_clip(job.source)):
                something |= result.something(self.engine.options)
                means.append(float(result.mask.mean()) / 255)
                yield result.mask, self._note(result)
            if not means:
                raise UserError(f"{job.source} has no frames: replace or remove it")
            if not something:  # before the writer puts the masks in their place
                raise _NothingFound

        try:
            self._write_clip(job, masks())
        except _NothingFound:
            clear_old(job)
            if self.fallback is None:
                return Outcome(job, "nothing")
            grey, note = self.fallback, {**self.settings, "found": [], "fallback": True}
            shapes = (frame.shape[:2] for frame in read_clip(job.source))
            self._write_clip(job, ((np.full(shape, grey, np.uint8), note) for shape in shapes))
            return Outcome(job, "nothing", mean=grey / 255)
        clear_old(job, keep=job.target)
        return Outcome(job, "written", mean=sum(means) / len(means))

    def _write_clip(self, job: Job, frames: Iterable[tuple[np.ndarray, dict[str, Any]]]) -> None:
        if job.target.suffix == ".mkv":
            write_video(job.target, frames, frame_rate(job.source))
        else:
            write_frames(job.target, frames)

    def _note(self, result: Result) -> dict[str, Any]:
        found = [
            {
                "words": words,
                "box": [round(float(edge), 1) for edge in one.box],
                "score": round(one.score, 3),
                "mask_score": round(one.mask_score, 3),
            }
            for words, instances in result.found.items()
            for one in instances
        ]
        return {**self.settings, "found": found}


def clear_old(job: Job, keep: Path | None = None) -> None:
    """Deletes older masks of this picture or clip: they would be read in place of, or before, what was found now."""
    while (old := job.existing()) is not None and old != keep:
        remove_mask(old)
