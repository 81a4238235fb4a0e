"""The detector that reads no words: one box in every picture, from `--reference_box`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from masked_loss_triton.generate.backends import Detection
from masked_loss_triton.generate.prompts import Options


def add_arguments(group: Any) -> None:
    """Its only flag, --reference_box, is one of the selection."""


def load(args: argparse.Namespace, options: Options) -> BoxDetector:
    """The box of the options."""
    return BoxDetector(options.reference_box)


class BoxDetector:
    """The same box, as fractions of the picture, for whatever is asked."""

    def __init__(self, fractions: tuple[float, float, float, float]) -> None:
        self.fractions = fractions

    def detect(self, pictures: Sequence[np.ndarray], words: Sequence[str]) -> list[list[list[Detection]]]:
        """See `Detector`."""
        left, top, right, bottom = self.fractions
        found = []
        for picture in pictures:
            height, width = picture.shape[:2]
            box = (round(left * width), round(top * height), round(right * width), round(bottom * height))
            found.append([[Detection(box, 1.0)] for _ in words])
        return found
