"""What this program writes into its own PNG files, so that it knows them again."""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from PIL import Image, PngImagePlugin

NOTE_KEY = "masked_loss_triton"


def png_note(note: dict[str, Any]) -> PngImagePlugin.PngInfo:
    """The note as a text of a PNG, for `Image.save(..., pnginfo=...)`."""
    info = PngImagePlugin.PngInfo()
    info.add_text(NOTE_KEY, json.dumps(note))
    return info


def read_png_note(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The note of a PNG, without decoding its pixels; None for a file of somebody else, or one that cannot be read."""
    with contextlib.suppress(Exception), Image.open(path, formats=("PNG",)) as image:
        note = json.loads(image.info[NOTE_KEY])
        return note if isinstance(note, dict) else None
    return None
