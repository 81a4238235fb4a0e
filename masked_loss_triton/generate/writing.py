"""Masks as files that `cache` reads: PNG, folders of PNGs, lossless video; always whole, never half.

A mask has the orientation of the stored pixels and carries the EXIF orientation of its picture: programs that turn pictures
upright turn both, the others neither. What it was made with stands in the text `masked_loss_triton` of the PNG.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import replace_file, sync_folder, temporary_folder, temporary_name
from masked_loss_triton.masks.sources import EXIF_ORIENTATION

TEXT_KEY = "masked_loss_triton"
# Back from upright to stored pixels, for each EXIF orientation.
TURN_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def write_mask(path: Path, mask: np.ndarray, made_with: dict[str, Any], orientation: int = 1) -> None:
    """One mask as a grey 8-bit PNG.

    Args:
        path: the PNG; its folder is made.
        mask: (H, W) uint8, upright.
        made_with: what is noted in the file.
        orientation: EXIF orientation of the picture, 1 to 8.

    Raises:
        UserError: naming the file that cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: _save(file, mask, made_with, orientation))


def _save(file: BinaryIO, mask: np.ndarray, made_with: dict[str, Any], orientation: int = 1) -> None:
    image = Image.fromarray(mask)
    note = PngImagePlugin.PngInfo()
    note.add_text(TEXT_KEY, json.dumps(made_with))
    extra: dict[str, Any] = {}
    if orientation in TURN_BACK:
        image = image.transpose(TURN_BACK[orientation])
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        extra["exif"] = exif.tobytes()
    image.save(file, "PNG", pnginfo=note, **extra)


def write_frames(path: Path, frames: Iterable[tuple[np.ndarray, dict[str, Any]]]) -> None:
    """The masks of a clip as a folder of PNGs, 000000.png and so on; the folder appears when it is complete.

    Args:
        path: the folder.
        frames: (H, W) uint8 and what is noted in the file, for each frame.

    Raises:
        UserError: naming the folder that cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(path) as building:
            for index, (mask, made_with) in enumerate(frames):
                with open(building / f"{index:06d}.png", "wb") as file:
                    _save(file, mask, made_with)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(building)
            remove_mask(path)
            os.replace(building, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def write_video(path: Path, frames: Iterable[tuple[np.ndarray, dict[str, Any]]], fps: Any) -> None:
    """The masks of a clip as one lossless video, FFV1 in Matroska. Arguments and errors as in `write_frames`."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)

    def encode(file: BinaryIO) -> None:
        # bitexact: otherwise the container gets random identifiers, and the same masks would give another file.
        with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
            stream: Any = None
            for mask, made_with in frames:
                if stream is None:
                    container.metadata[TEXT_KEY] = json.dumps(made_with)
                    stream = container.add_stream("ffv1", rate=fps)
                    stream.height, stream.width = mask.shape
                    stream.pix_fmt = "gray"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(mask, format="gray")))
            if stream is not None:
                container.mux(stream.encode())

    replace_file(path, encode)


def read_note(path: Path) -> dict[str, Any] | None:
    """What a mask was made with; None for one that this command did not write."""
    with contextlib.suppress(Exception):
        if path.is_dir():
            path = next(iter(sorted(path.glob("*.png"))))
        if path.suffix.lower() == ".png":
            with Image.open(path) as image:
                return json.loads(image.info[TEXT_KEY])
        import av

        with av.open(os.fspath(path)) as container:
            # Matroska writes its tags in capitals.
            tags = {key.lower(): value for key, value in container.metadata.items()}
            return json.loads(tags[TEXT_KEY])
    return None


def remove_mask(path: Path) -> None:
    """Deletes a mask, file or folder, if it is there; a folder in one step, so that half of it never stays."""
    if path.is_dir() and not path.is_symlink():
        leaving = temporary_name(path)
        os.replace(path, leaving)
        shutil.rmtree(leaving, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
