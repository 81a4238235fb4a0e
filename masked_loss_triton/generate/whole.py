"""Masks of everything: no model. With `--intervals` the whole picture counts in some seconds of a clip and nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.generate.engine import Found, FrameMask, WholeEngine
from masked_loss_triton.generate.prompts import MaskRequest


def add_arguments(group: Any) -> None:
    """Adds nothing: it has no flags."""


def load(request: MaskRequest, **_: Any) -> Everything:
    """Makes the engine; there is nothing to load."""
    return Everything(request)


class Everything(WholeEngine):
    """Makes masks of everything."""

    def find(self, picture: np.ndarray, source: Path) -> Found:
        """See `WholeEngine`."""
        return self.one_instance(np.ones(picture.shape[:2], bool))

    def masks_of_clip(self, frames: Iterable[np.ndarray], source: Path) -> Iterator[FrameMask]:
        """See `WholeEngine`."""
        return (self.mask_of(frame, self.find(frame, source)) for frame in frames)
