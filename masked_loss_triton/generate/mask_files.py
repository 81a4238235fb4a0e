"""Masks as files that `cache` reads: PNG, folders of PNGs, lossless video; always whole, never half.

A mask has the orientation of the stored pixels and carries the EXIF orientation of its picture: programs that turn pictures
upright turn both, the others neither. What it was made with stands in a note in the file, with a digest of its contents: a
mask that somebody has changed since is not taken for a generated one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import (
    NO_FILE,
    changed_meanwhile,
    identity,
    replace_file,
    sync_folder,
    temporary_folder,
)
from masked_loss_triton.files.notes import NOTE_KEY, png_note, read_png_note
from masked_loss_triton.masks.frames import MASK_EXTENSIONS, frame_files
from masked_loss_triton.masks.sources import EXIF_ORIENTATION

OVERWRITE = ("none", "generated", "drawn")
# What file managers leave in folders that they show: nobody's work.
LITTER = (".ds_store", "thumbs.db", "desktop.ini")
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
# Ends a video: an EBML element that players pass over, with the SHA-256 of everything before it.
SEAL = b"\xec\xa0"
SEAL_BYTES = len(SEAL) + hashlib.sha256().digest_size


def write_mask(
    path: Path,
    mask: np.ndarray,
    made_with: dict[str, Any],
    orientation: int = 1,
    *,
    expected: tuple[int, ...] | None = None,
) -> None:
    """Writes one mask as a grey 8-bit PNG.

    Args:
        path: the PNG; its folder is made.
        mask: (H, W) uint8, upright.
        made_with: what is noted in the file.
        orientation: EXIF orientation of the picture, 1 to 8.
        expected: the only file that may be replaced, as `Replacement.keep_copy` gives it; None for any.

    Raises:
        UserError: naming the file that cannot be written, or that is another one.
    """
    _make_parent(path)
    replace_file(path, lambda file: _save(file, mask, made_with, orientation), expected=expected)


def _save(file: BinaryIO, mask: np.ndarray, made_with: dict[str, Any], orientation: int = 1) -> None:
    image = Image.fromarray(mask)
    extra: dict[str, Any] = {}
    if orientation in TURN_BACK:
        image = image.transpose(TURN_BACK[orientation])
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        extra["exif"] = exif.tobytes()
    image.save(file, "PNG", pnginfo=png_note({**made_with, "pixels": _digest(image)}), **extra)


def write_frames(
    path: Path, frames: Iterable[tuple[np.ndarray, dict[str, Any]]], clear: Callable[[Path], None]
) -> None:
    """Writes the masks of a clip as a folder of PNGs, 000000.png and so on; the folder appears when it is complete.

    Args:
        path: the folder.
        frames: (H, W) uint8 and what is noted in the file, for each frame.
        clear: takes an older mask of that name away, or raises; called when all frames are written.

    Raises:
        UserError: naming the folder that cannot be written.
    """
    _make_parent(path)
    try:
        with temporary_folder(path) as building:
            for index, (mask, made_with) in enumerate(frames):
                with open(building / f"{index:06d}.png", "wb") as file:
                    _save(file, mask, made_with)
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(building)
            if is_mask(path):
                clear(path)
            os.replace(building, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error


def write_video(
    path: Path,
    frames: Iterable[tuple[np.ndarray, dict[str, Any]]],
    fps: Any,
    keep_copy: Callable[[Path], tuple[int, ...]],
) -> None:
    """Writes the masks of a clip as one lossless video, FFV1 in Matroska.

    Args:
        path: the video.
        frames: (H, W) uint8 and what is noted in the file, for each frame.
        fps: frames per second.
        keep_copy: makes way for the video and says which file it may replace, or raises; called when all frames are encoded.

    Raises:
        UserError: naming the video that cannot be written.
    """
    import av

    _make_parent(path)

    with tempfile.TemporaryFile() as encoded:
        # bitexact: otherwise the container gets random identifiers, and the same masks would give another file.
        with av.open(encoded, "w", format="matroska", options={"fflags": "+bitexact"}) as container:
            stream: Any = None
            for mask, made_with in frames:
                if stream is None:
                    container.metadata[NOTE_KEY] = json.dumps(made_with)
                    stream = container.add_stream("ffv1", rate=fps)
                    stream.height, stream.width = mask.shape
                    stream.pix_fmt = "gray"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(mask, format="gray")))
            if stream is not None:
                container.mux(stream.encode())
        encoded.seek(0)
        replace_file(path, lambda file: _copy_and_seal(encoded, file), expected=keep_copy(path))


def _copy_and_seal(source: BinaryIO, file: BinaryIO) -> None:
    digest = hashlib.sha256()
    while chunk := source.read(1 << 20):
        digest.update(chunk)
        file.write(chunk)
    file.write(SEAL + digest.digest())


def read_note(path: Path) -> dict[str, Any] | None:
    """What a mask was made with; None for one that this command did not write."""
    with contextlib.suppress(Exception):
        if path.is_dir():
            path = frame_files(path, MASK_EXTENSIONS)[0]
        if path.suffix.lower() == ".png":
            note = read_png_note(path)
            return note if note and "found" in note else None
        if path.suffix.lower() == ".mkv":
            import av

            with av.open(os.fspath(path)) as container:
                # Matroska writes its tags in capitals.
                tags = {key.lower(): value for key, value in container.metadata.items()}
                return json.loads(tags[NOTE_KEY])
    return None


def is_mask(path: Path) -> bool:
    """Whether a path is a mask, or a folder with the masks of a clip in it."""
    try:
        return bool(frame_files(path, MASK_EXTENSIONS)) if path.is_dir() else path.exists()
    except OSError:
        return False


def is_generated(path: Path) -> bool:
    """Whether a mask was written by this command and is as it was written: file, or folder with nothing else in it."""
    try:
        if path.is_dir():
            names = [name for name in os.listdir(path) if name.lower() not in LITTER and not name.startswith("._")]
            return bool(names) and all(
                name.endswith(".png") and not (path / name).is_dir() and is_generated(path / name) for name in names
            )
        if path.suffix.lower() == ".png":
            note = read_png_note(path) or {}
            with Image.open(path, formats=("PNG",)) as image:
                return note.get("pixels") == _digest(image)
        with open(path, "rb") as file:
            content = file.read()
        return content[-SEAL_BYTES:] == SEAL + hashlib.sha256(content[:-SEAL_BYTES]).digest()
    except Exception:  # damaged, or not to be read: not to be replaced unasked either
        return False


@dataclasses.dataclass(frozen=True)
class Replacement:
    """Which masks a run may replace, and where it keeps copies of those that a person made.

    Args:
        overwrite: "none", "generated" or "drawn"; the last allows all.
        masks: the folder of the masks.
        copies: the folder of the copies, with the sub-folders of `masks`.
    """

    overwrite: str
    masks: Path
    copies: Path

    def allows(self, path: Path) -> bool:
        """Whether this mask may be replaced."""
        return self.overwrite == "drawn" or (self.overwrite == "generated" and is_generated(path))

    def check_free(self, target: Path, masks: Collection[Path]) -> None:
        """Raises UserError where something else than the masks that were found has the name of a mask that is to be written."""
        if target not in masks and is_mask(target):
            raise changed_meanwhile(target)
        empty = target.is_dir() and not target.is_symlink() and not any(target.iterdir())
        if os.path.lexists(target) and target not in masks and not empty:
            raise UserError(f"{target} is in the way and is no mask: move it, or give another --masks")

    def keep_copy(self, path: Path) -> tuple[int, ...]:
        """Copies a mask file that is about to be replaced, unless it is a generated one.

        Returns:
            The `identity` of the file that was looked at: what a person saves from now on is another one.

        Raises:
            UserError: for a mask that may not be replaced.
        """
        if not os.path.lexists(path):
            return NO_FILE
        seen = identity(os.stat(path))
        if is_generated(path):
            return seen
        if self.overwrite != "drawn":
            raise UserError(f"{path} is not a mask that generate made: --overwrite drawn replaces it and keeps a copy")
        copy = self._free_copy(path)
        replace_file(copy, lambda file: file.write(path.read_bytes()))
        shutil.copystat(path, copy)
        return seen

    def clear(self, path: Path) -> None:
        """Takes a mask away: a generated one is deleted, one that a person made is moved to the copies.

        Raises:
            UserError: for a mask that may not be replaced, or cannot be moved.
        """
        try:
            if path.is_symlink():  # what it leads to stays
                self.keep_copy(path)
                path.unlink()
            elif is_generated(path):
                self._delete(path)
            elif self.overwrite == "drawn":
                os.rename(path, self._free_copy(path))
            else:
                raise UserError(f"{path} is not what generate made: --overwrite drawn moves it to a copy")
        except OSError as error:
            raise UserError(f"{path} cannot be replaced ({error.strerror}): it stays") from error

    def _delete(self, path: Path) -> None:
        """Deletes a generated mask in one step, so that half of it never stays, unless somebody changes it in this moment."""
        with temporary_folder(path) as leaving:
            os.rename(path, leaving / path.name)
            if not is_generated(leaving / path.name):
                os.rename(leaving / path.name, path)
                raise changed_meanwhile(path)

    def _free_copy(self, path: Path) -> Path:
        copy = self.copies / path.relative_to(self.masks)
        _make_parent(copy)
        free, number = copy, 1
        while os.path.lexists(free):
            number += 1
            free = copy.with_name(f"{number}-{copy.name}")
        return free


def _digest(image: Image.Image) -> str:
    """Of the pixels and their size and mode."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:32]


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror})") from error
