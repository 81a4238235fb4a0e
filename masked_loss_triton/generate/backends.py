"""Defines what a detector and a segmenter are, and lists them.

Each is a module with `add_arguments(group)`, whose flags begin with the name of the module, and `load(request, ...)`, which takes
these flags, device, dtype and batch_size by name. A new one is its file and its line in a table below.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.prompts import MaskRequest

DETECTORS = {
    "florence2": "masked_loss_triton.generate.florence2",
    "box": "masked_loss_triton.generate.box",
}
SEGMENTERS = {
    "sam2": "masked_loss_triton.generate.sam2",
    "grabcut": "masked_loss_triton.generate.grabcut",
}
ALIASES = {"grabcut": "box+grabcut"}
DEFAULT = "florence2+sam2"

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels, right and bottom excluded


@dataclasses.dataclass(frozen=True)
class Detection:
    """A box round something, and how sure the detector is of it, 0 to 1."""

    box: Box
    score: float


@dataclasses.dataclass(frozen=True)
class Cutout:
    """What a segmenter cut out, (H, W) bool, and how good it thinks that is, 0 to 1."""

    mask: np.ndarray
    score: float


class Detector(Protocol):
    """Finds boxes. Safe to call from several threads."""

    def detect(self, pictures: Sequence[np.ndarray], words: Sequence[str]) -> list[list[list[Detection]]]:
        """Returns what was found in each picture, (H, W, 3) uint8, for each of the words, in no order."""
        ...


class Segmenter(Protocol):
    """Cuts out what is in boxes, and follows it through a clip. Safe to call from several threads.

    `workers` is the number of batches that are worth working on at once.
    """

    workers: int

    def segment(self, pictures: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[list[Cutout]]:
        """Cuts out what is in each box of each picture, (H, W, 3) uint8."""
        ...

    def follow(self, frames: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """Yields the masks of every frame, (H, W) bool, in the order of `masks`, which are those of the first frame."""
        ...


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of all detectors and segmenters, a group for each."""
    for kind, table in (("detector", DETECTORS), ("segmenter", SEGMENTERS)):
        for name, module in table.items():
            importlib.import_module(module).add_arguments(parser.add_argument_group(f"{kind} {name}"))


def split_backend(backend: str) -> tuple[str, str]:
    """Returns the names of the detector and the segmenter of a backend.

    Raises:
        UserError: for a backend that does not exist.
    """
    detector, _, segmenter = ALIASES.get(backend, backend).partition("+")
    if detector not in DETECTORS or segmenter not in SEGMENTERS:
        raise UserError(
            f"--backend {backend}: write DETECTOR+SEGMENTER with a detector of {', '.join(DETECTORS)} and a segmenter of "
            f"{', '.join(SEGMENTERS)}, or {', '.join(ALIASES)}",
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
    for name, module in zip(split_backend(backend), _modules(backend), strict=True):
        flags = {key: value for key, value in (models or {}).items() if key.startswith(f"{name}_")}
        try:
            loaded.append(module.load(request, device=device, dtype=dtype, batch_size=batch_size, **flags))
        except UserError as error:
            problems.append(error)
    if problems:
        # The same sentence twice (no transformers) is said once.
        said = "; ".join(dict.fromkeys(map(str, problems)))
        raise UserError(f"{said} (--backend grabcut needs no weights)", problems[0].exit_status)
    return loaded[0], loaded[1]


def _modules(backend: str) -> list[Any]:
    detector, segmenter = split_backend(backend)
    return [importlib.import_module(module) for module in (DETECTORS[detector], SEGMENTERS[segmenter])]
