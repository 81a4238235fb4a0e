"""The interface of detectors and segmenters, and which there are.

Each is a module with `add_arguments(group)` and `load(args, options)`; a new one is its file and its line in a table below.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.prompts import Options

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
    """(H, W) bool, and how good the segmenter thinks it is, 0 to 1."""

    mask: np.ndarray
    score: float


class Detector(Protocol):
    """Finds boxes. Safe to call from several threads."""

    def detect(self, pictures: Sequence[np.ndarray], words: Sequence[str]) -> list[list[list[Detection]]]:
        """For each picture, (H, W, 3) uint8, and for each of the words, what was found, in no order."""
        ...


class Segmenter(Protocol):
    """Cuts out what is in boxes, and follows it through a clip. Safe to call from several threads.

    `workers` is the number of batches that are worth working on at once.
    """

    workers: int

    def segment(self, pictures: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[list[Cutout]]:
        """For each picture, (H, W, 3) uint8, and for each of its boxes, what is in it."""
        ...

    def follow(self, frames: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """The masks of every frame, (H, W) bool, in the order of `masks`, which are those of the first frame."""
        ...


def add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of all detectors and segmenters, a group for each."""
    for kind, table in (("detector", DETECTORS), ("segmenter", SEGMENTERS)):
        for name, module in table.items():
            importlib.import_module(module).add_arguments(parser.add_argument_group(f"{kind} {name}"))


def split_backend(backend: str) -> tuple[str, str]:
    """The names of the detector and the segmenter of a backend.

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


def load_backend(args: argparse.Namespace, options: Options) -> tuple[Detector, Segmenter]:
    """The detector and the segmenter of `--backend`.

    Raises:
        UserError: for weights that are absent, of both models in one message.
    """
    detector, segmenter = split_backend(args.backend)
    loaded: list[Any] = []
    problems: list[UserError] = []
    for module in (DETECTORS[detector], SEGMENTERS[segmenter]):
        try:
            loaded.append(importlib.import_module(module).load(args, options))
        except UserError as error:
            problems.append(error)
    if problems:
        # The same sentence twice (no transformers) is said once.
        said = "; ".join(dict.fromkeys(map(str, problems)))
        raise UserError(f"{said} (--backend grabcut needs no weights)", problems[0].exit_status)
    return loaded[0], loaded[1]
