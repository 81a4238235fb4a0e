"""Makes masks as a library: everything that decides a run, and the work on batches of pictures and on clips.

jobs = find_jobs(Path("photos"), Path("masks")).jobs
generation = Generation(request=MaskRequest(prompts=(Prompt("person"),)), masks=Path("masks"))
for done in generate_masks(jobs, generation):
    print(done.status, done.job.source, done.message)
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.notes import read_png_note
from masked_loss_triton.files.parallel import run_parallel
from masked_loss_triton.generate.backends import ENGINES, load_backend, load_engine
from masked_loss_triton.generate.engine import Engine, FrameMask, WholeEngine
from masked_loss_triton.generate.jobs import Job
from masked_loss_triton.generate.mask_files import (
    OVERWRITE,
    Replacement,
    is_generated,
    is_mask,
    read_note,
    write_frames,
    write_mask,
    write_video,
)
from masked_loss_triton.generate.prompts import MaskRequest
from masked_loss_triton.generate.quality import marks_of_clip, picture_marks
from masked_loss_triton.generate.saliency import Saliency, find_saliency
from masked_loss_triton.masks.frames import animation_frames, frame_rate, read_clip, read_frames, to_uint8
from masked_loss_triton.masks.reading import read_mask_file, read_picture
from masked_loss_triton.masks.sources import exif_orientation

FALLBACKS = {"none": None, "black": 0, "white": 255}
ANIMATION = "it is an animation: only its first frame is masked, and trained"
COPIES = ".replaced-masks"  # in the folder of the masks; hidden folders are read as masks by no command


@dataclasses.dataclass(frozen=True)
class Done:
    """What became of one job.

    Attributes:
        job: the picture or clip.
        status: "written"; "nothing" when no prompt was found; "kept" when its mask was drawn by hand; "no picture" when it is
            a mask or contact sheet of an earlier run; "problem".
        message: what is wrong, or why nothing was found, one line.
        mean: mean weight of the mask that was written, 0 to 1.
        detected: whether what it shows was detected: False where a box was given.
        marks: what is odd about it, see `quality`.
    """

    job: Job
    status: str
    message: str = ""
    mean: float = 0.0
    detected: bool = True
    marks: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Everything that decides the masks of a run; small and picklable, so that a process elsewhere can make its own worker.

    Args:
        request: what is looked for, and how it becomes a mask.
        masks: the folder of the masks.
        backend: DETECTOR+SEGMENTER, see `choose_backend`.
        models: the flags of the detector and the segmenter, by name: {"sam2_model": "facebook/sam2.1-hiera-small"}.
        device, dtype: of the models.
        batch_size: pictures for the models at once.
        key_interval: clips are looked at anew every so many frames.
        no_detection: "none", "black" or "white": the mask where nothing was found.
        compare: whether each picture's mask is compared with what stands out, for its marks; half a second or two each.
        overwrite: which masks are made again: "none", "generated" (those of an earlier run), "drawn" (all; what was drawn by
            hand is kept in a folder `.replaced-masks` in `masks`).
        debug: let unexpected errors through instead of telling them as a problem of the file.
        started: names the folder of the copies.
    """

    request: MaskRequest
    masks: Path
    backend: str = "florence2+sam2"
    models: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 4
    key_interval: int = 24
    no_detection: str = "none"
    compare: bool = False
    overwrite: str = "none"
    debug: bool = False
    started: str = dataclasses.field(default_factory=lambda: time.strftime("%Y%m%d-%H%M%S"))

    def __post_init__(self) -> None:
        for field, choices in (("no_detection", FALLBACKS), ("overwrite", OVERWRITE)):
            if getattr(self, field) not in choices:
                raise UserError(f"{field} must be one of {', '.join(choices)}, got {getattr(self, field)!r}", 2)
        for field in ("batch_size", "key_interval"):
            if getattr(self, field) < 1:
                raise UserError(f"--{field} must be 1 or more, got {getattr(self, field)}", 2)

    @property
    def copies(self) -> Path:
        """Where masks drawn by hand are kept when they are replaced."""
        return self.masks / COPIES / self.started

    def note(self) -> dict[str, Any]:
        """What is written into each mask beside what was found. Files and folders by name: where they lie is private."""
        models = {key: Path(value).name if is_path(key, value) else value for key, value in self.models.items()}
        return {
            "backend": self.backend,
            **self.request.note(),
            "no_detection": self.no_detection,
            "dtype": self.dtype,
            "key_interval": self.key_interval,
            **models,
        }

    def worker(self) -> Worker:
        """Loads the models.

        Raises:
            UserError: for weights that are absent.
        """
        if self.backend in ENGINES:
            whole = load_engine(self.backend, self.request, self.models, device=self.device, dtype=self.dtype)
            return Worker(whole, self, find_saliency(self.models) if self.compare else None)
        detector, segmenter = load_backend(
            self.backend,
            self.request,
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
            models=self.models,
        )
        engine = Engine(detector, segmenter, self.request, self.key_interval)
        return Worker(engine, self, find_saliency(self.models) if self.compare else None)

    def batches(self, jobs: Iterable[Job]) -> Iterator[list[Job]]:
        """Pictures by `batch_size`, each clip alone, in the order of the jobs."""
        batch: list[Job] = []
        for job in jobs:
            if job.is_clip:
                yield [job]
                continue
            batch.append(job)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch


def is_path(flag: str, value: Any) -> bool:
    """Whether the value of a backend's flag is a file or folder that is there."""
    return flag.endswith(("_model", "_dir")) and os.path.exists(value)


def generate_masks(jobs: Sequence[Job], generation: Generation) -> Iterator[Done]:
    """Makes and writes the masks of the jobs in a few threads; yields what became of each, as they are done.

    Raises:
        UserError: when the models cannot be loaded. What is wrong with a single file is a `Done` of that file.
    """
    worker = generation.worker()
    for finished in run_parallel(worker.run, generation.batches(jobs), worker.engine.workers):
        yield from finished


class _NothingFound(Exception):
    """Raised where nothing was found in any frame of a clip."""


class Worker:
    """Makes the masks of batches of jobs and writes them. Safe to call from several threads.

    Args:
        engine: what finds things and makes masks of them.
        generation: what is noted in the masks, what stands in for a mask where nothing was found, which masks may go.
        saliency: finds what stands out, to compare with; None compares nothing.
    """

    def __init__(self, engine: Engine | WholeEngine, generation: Generation, saliency: Saliency | None = None) -> None:
        self.saliency = saliency
        self.engine, self.note, self.debug = engine, generation.note(), generation.debug
        self.fallback = FALLBACKS[generation.no_detection]
        self.replacement = Replacement(generation.overwrite, generation.masks, generation.copies)

    def run(self, batch: Sequence[Job]) -> list[Done]:
        """What became of a batch: several pictures, or one clip."""
        finished: list[Done] = []
        jobs, pictures = [], []
        for job in batch:
            done = self._guarded(job, self._passed_over, job)
            if done is None and job.is_clip:
                done = self._guarded(job, self._clip, job)
            elif done is None:
                try:
                    pictures.append(read_picture(job.source).rgb)
                    jobs.append(job)
                except UserError as error:
                    done = Done(job, "problem", str(error))
            if done is not None:
                finished.append(done)
        return finished + (self._pictures(jobs, pictures) if jobs else [])

    def written_since(self, job: Job) -> Done | None:
        """What became of a job that another worker has written since the run began; None where its target is not generated."""
        mask = job.mask()
        if mask != job.target or not is_generated(mask):
            return None
        self._clear(job, but=mask)
        frames = read_frames(mask) if job.is_clip else [to_uint8(read_mask_file(mask))]
        means = [float(frame.mean()) / 255 for frame in frames]
        note = read_note(mask) or {}
        detected = any(one["score"] is not None for one in note.get("found", ()))
        status = "nothing" if note.get("fallback") else "written"
        marks = marks_of_clip(mask) if job.is_clip else note.get("marks", ())
        return Done(job, status, "", sum(means) / len(means), detected, tuple(marks))

    def _passed_over(self, job: Job) -> Done | None:
        """What becomes of a job without looking at its picture, or None for one that is to be worked on.

        Raises:
            UserError: naming what is in the way of its mask.
        """
        note = read_png_note(job.source) if job.source.suffix.lower() == ".png" else None
        if note is not None and ("found" in note or "contact_sheet" in note):
            return Done(job, "no picture")
        if not all(self.replacement.allows(path) for path in job.masks):
            return Done(job, "kept")
        self.replacement.check_free(job.target, job.masks)
        return None

    def _pictures(self, jobs: list[Job], pictures: list[np.ndarray]) -> list[Done]:
        if len(jobs) == 1:
            (job,), (picture,) = jobs, pictures
            return [self._guarded(job, lambda: self._write(job, picture, self.engine.masks(pictures, [job.source])[0]))]
        try:
            results = self.engine.masks(pictures, [job.source for job in jobs])
        except Exception:  # one of them spoils the batch, or all are too much for the memory: one by one it shows
            singles = zip(jobs, pictures, strict=True)
            return [done for job, picture in singles for done in self._pictures([job], [picture])]
        return [self._guarded(job, self._write, job, *rest) for job, *rest in zip(jobs, pictures, results, strict=True)]

    def _guarded(self, job: Job, make: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return make(*arguments)
        except UserError as error:
            return Done(job, "problem", str(error))
        except Exception as error:
            # A night's run must not end at one picture that a model or a codec cannot take.
            if self.debug:
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            return Done(job, "problem", f"{job.source}: {type(error).__name__}: {reason} (--debug shows where)")

    def _write(self, job: Job, picture: np.ndarray, result: FrameMask) -> Done:
        mask, note, status, marks = result.mask, self._note_of(result), "written", self._marks(picture, result)
        if animation_frames(job.source) > 1:
            marks.append(ANIMATION)
        if not result.found_any(self.engine.request):
            status = "nothing"
            if self.fallback is None:
                self._clear(job)
                return Done(job, status, self.engine.nothing)
            mask, note, marks = np.full_like(mask, self.fallback), {**note, "fallback": True}, []
        note["marks"] = marks
        expected = self.replacement.keep_copy(job.target)
        write_mask(job.target, mask, note, exif_orientation(job.source), expected=expected)
        self._clear(job, but=job.target)
        return Done(job, status, "", float(mask.mean()) / 255, result.detected, tuple(marks))

    def _marks(self, picture: np.ndarray, result: FrameMask) -> list[str]:
        if not self.engine.judged:  # what it covers, and along what, says nothing
            return []
        instances = [one for found in result.found.values() for one in found]
        given = [one.box for one in instances if one.score is None]
        scores = [score for one in instances for score in (one.score, one.mask_score) if score is not None]
        salience = None if self.saliency is None else self.saliency.salience(picture) > 0.5
        mask = (255 - result.mask if self.engine.request.invert else result.mask) > 127
        return picture_marks(picture, mask, given, scores, salience)

    def _clip(self, job: Job) -> Done:
        means: list[float] = []
        detected = False

        def masks() -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
            nonlocal detected
            found_any, fps, request = False, frame_rate(job.source), self.engine.request
            for number, result in enumerate(self.engine.masks_of_clip(read_clip(job.source), job.source)):
                if not request.counts_at(number / float(fps)):
                    result = dataclasses.replace(result, mask=np.zeros_like(result.mask))
                found_any |= result.found_any(request)
                detected |= result.detected
                means.append(float(result.mask.mean()) / 255)
                yield result.mask, self._note_of(result)
            if not means:
                raise UserError(f"{job.source} has no frames: replace or remove it")
            if not found_any:  # before the writer puts the masks in their place
                raise _NothingFound

        try:
            self._write_clip(job, masks())
        except _NothingFound:
            if self.fallback is None:
                self._clear(job)
                return Done(job, "nothing", self.engine.nothing)
            grey, note = self.fallback, {**self.note, "found": [], "fallback": True}
            shapes = (frame.shape[:2] for frame in read_clip(job.source))
            self._write_clip(job, ((np.full(shape, grey, np.uint8), note) for shape in shapes))
            return Done(job, "nothing", mean=grey / 255)
        return Done(job, "written", "", sum(means) / len(means), detected, tuple(marks_of_clip(job.target)))

    def _write_clip(self, job: Job, frames: Iterable[tuple[np.ndarray, dict[str, Any]]]) -> None:
        if job.target.name == f"{job.source.stem}.mkv":
            write_video(job.target, frames, frame_rate(job.source), self.replacement.keep_copy)
        else:
            write_frames(job.target, frames, self.replacement.clear)
        self._clear(job, but=job.target)

    def _clear(self, job: Job, but: Path | None = None) -> None:
        """Takes older masks away: they would be read in place of, or before, what was found now."""
        for path in job.masks:
            if path != but and is_mask(path):
                self.replacement.clear(path)

    def _note_of(self, result: FrameMask) -> dict[str, Any]:
        found = [
            {
                "words": words,
                "box": [round(float(edge), 1) for edge in one.box],
                "score": None if one.score is None else round(one.score, 3),
                "mask_score": None if one.mask_score is None else round(one.mask_score, 3),
            }
            for words, instances in result.found.items()
            for one in instances
        ]
        return {**self.note, "found": found}
