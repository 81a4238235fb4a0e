"""A detector that reads no words: it finds one box in every picture, that of `--reference_box`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from masked_loss_triton.generate.backends import Detection
from masked_loss_triton.generate.prompts import MaskRequest


def add_arguments(group: Any) -> None:
    """Adds nothing: the box is a flag of the command."""


def load(request: MaskRequest, **_: Any) -> BoxDetector:
    """Makes the detector of the request's box."""
    return BoxDetector(request.reference_box)


class BoxDetector:
    """Returns the same box, given as fractions of the picture, for whatever words: it detects nothing."""

    def __init__(self, fractions: tuple[float, float, float, float]) -> None:
        self.fractions = fractions

    def detect(self, pictures: Sequence[np.ndarray], words: Sequence[str]) -> list[list[list[Detection]]]:
        """See `Detector`."""
        left, top, right, bottom = self.fractions
        found = []
        for picture in pictures:
            height, width = picture.shape[:2]
            box = (round(left * width), round(top * height), round(right * width), round(bottom * height))
            found.append([[Detection(box, None)] for _ in words])
        return found
