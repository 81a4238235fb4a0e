"""Defines what a detector and a segmenter are, and lists them.

Each is a module with `add_arguments(group)`, whose flags begin with the name of the module, and `load(request, ...)`, which takes
these flags, device, dtype and batch_size by name. A new one is its file and its line in a table below.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.prompts import MaskRequest


class Entry(NamedTuple):
    """A line of the tables.

    Attributes:
        module: its file in this folder, without .py.
        masks: for one that reads no words, what its one layer is called; else empty.
        on_the_cpu: it needs no GPU.
    """

    module: str
    masks: str = ""
    on_the_cpu: bool = False

    def load(self) -> Any:
        """Imports the module."""
        return importlib.import_module(f"{__package__}.{self.module}")


DETECTORS = {
    "florence2": Entry("florence2"),
    "u2net": Entry("saliency", masks="what stands out", on_the_cpu=True),
    "box": Entry("box", masks="the box", on_the_cpu=True),
}
SEGMENTERS = {
    "sam2": Entry("sam2"),
    "u2net": Entry("saliency", on_the_cpu=True),
    "grabcut": Entry("grabcut", on_the_cpu=True),
}
# Both in one, from files beside the picture; `load` returns an engine.
WHOLE = {
    "difference": Entry("difference", masks="what differs", on_the_cpu=True),
    "static": Entry("static", masks="what changes", on_the_cpu=True),
    "whole": Entry("whole", masks="everything", on_the_cpu=True),
}
# Both in one, by words; `load` returns an engine.
BY_WORDS = {"sam3": Entry("sam3")}
ENGINES = {**BY_WORDS, **WHOLE}
ALIASES = {"u2net": "u2net+u2net", "grabcut": "box+grabcut"}
DEFAULT = "auto"
# What reads no words, and what its one layer is called.
WORDLESS = {name: entry.masks for name, entry in {**DETECTORS, **ENGINES}.items() if entry.masks}

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, right and bottom excluded


@dataclasses.dataclass(frozen=True)
class Detection:
    """A box round something, and how sure the detector is of it, 0 to 1; None for a box that was given and not detected."""

    box: Box
    score: float | None


@dataclasses.dataclass(frozen=True)
class Cutout:
    """What a segmenter cut out, (H, W) bool, and how good it thinks that is, 0 to 1; None where it does not judge itself."""

    mask: np.ndarray
    score: float | None


class Detector(Protocol):
    """Finds boxes. Safe to call from several threads."""

    def detect(self, pictures: Sequence[np.ndarray], words: Sequence[str]) -> list[list[list[Detection]]]:
        """Returns what was found in each picture, (H, W, 3) uint8, for each of the words, in no order."""
        ...


class Segmenter(Protocol):
    """Cuts out what is in boxes, and follows it through a clip. Safe to call from several threads.

    `workers` is the number of batches that are worth working on at once. Where it `remembers`, what it followed to a frame in
    which things are found anew is joined to what is found there.
    """

    workers: int
    remembers: bool

    def segment(self, pictures: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[list[Cutout]]:
        """Cuts out what is in each box of each picture, (H, W, 3) uint8."""
        ...

    def follow(self, frames: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """Yields the masks of every frame, (H, W) bool, in the order of `masks`, which are those of the first frame."""
        ...


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of all detectors and segmenters, a group for each."""
    tables = {"detector": DETECTORS, "segmenter": SEGMENTERS, "backend": ENGINES}
    for name, entry in {**DETECTORS, **SEGMENTERS, **ENGINES}.items():
        kinds = [kind for kind, table in tables.items() if name in table]
        entry.load().add_arguments(parser.add_argument_group(f"{' and '.join(kinds)} {name}"))


def split_backend(backend: str) -> tuple[str, str]:
    """Returns the names of the detector and the segmenter of a backend, other than "auto"; twice the same of one that is both.

    Raises:
        UserError: for a backend that does not exist.
    """
    if backend in ENGINES:
        return backend, backend
    detector, _, segmenter = ALIASES.get(backend, backend).partition("+")
    if detector not in DETECTORS or segmenter not in SEGMENTERS:
        raise UserError(
            f"--backend {backend}: write DETECTOR+SEGMENTER with a detector of {', '.join(DETECTORS)} and a segmenter of "
            f"{', '.join(SEGMENTERS)}, or {', '.join((*ALIASES, *ENGINES))}",
            2,
        )
    return detector, segmenter


def load_backend(
    backend: str,
    request: MaskRequest,
    *,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 4,
    models: Mapping[str, Any] | None = None,
) -> tuple[Detector, Segmenter]:
    """Loads the detector and the segmenter of a backend.

    Args:
        backend: DETECTOR+SEGMENTER, or an alias.
        request: what is looked for; a detector without words takes its box from it.
        device, dtype: of the models; "auto" takes the first device there is, and what it computes fast in.
        batch_size: pictures for the models at once.
        models: flags of the two, by name: `{"sam2_model": "folder"}`. Those of others do not count.

    Raises:
        UserError: for weights that are absent, of both models in one message.
    """
    loaded: list[Any] = []
    problems: list[UserError] = []
    for module in _modules(backend):
        flags = flags_of(module, models or {})
        try:
            loaded.append(module.load(request, device=device, dtype=dtype, batch_size=batch_size, **flags))
        except UserError as error:
            problems.append(error)
    if problems:
        # The same sentence twice (no transformers) is said once.
        said = "; ".join(dict.fromkeys(map(str, problems)))
        raise UserError(f"{said} (--backend grabcut needs no weights, and reads no words)", problems[0].exit_status)
    return loaded[0], loaded[1]


def load_engine(
    backend: str, request: MaskRequest, models: Mapping[str, Any], *, device: str = "auto", dtype: str = "auto"
) -> Any:
    """Loads the engine of a backend of `ENGINES`.

    Raises:
        UserError: for what is missing beside the pictures, and for weights that are absent.
    """
    (module,) = _modules(backend)
    return module.load(request, device=device, dtype=dtype, **flags_of(module, models))


def flags_of(backend: str | Any, models: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of the flags that belong to a backend, or to one of its modules: they begin with the module's name."""
    modules = _modules(backend) if isinstance(backend, str) else [backend]
    prefixes = tuple(f"{module.__name__.rpartition('.')[2]}_" for module in modules)
    return {key: value for key, value in models.items() if key.startswith(prefixes)}


def entries(backend: str) -> list[Entry]:
    """Returns the lines of the tables that a backend is made of.

    Raises:
        UserError: see `split_backend`.
    """
    detector, segmenter = split_backend(backend)
    return [ENGINES[backend]] if backend in ENGINES else [DETECTORS[detector], SEGMENTERS[segmenter]]


def _modules(backend: str) -> list[Any]:
    return [entry.load() for entry in entries(backend)]
