"""Walks through folders, and tries whether they can be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from masked_loss_triton.errors import UserError


def walk_files(folder: Path, leave_out: Collection[Path] = ()) -> Iterator[Path]:
    """Every file below a folder, folder by folder, in the order of their names. Hidden files and folders are left out.

    Args:
        folder: where to begin. Links to folders are not followed.
        leave_out: folders below it that are not entered, as `Path.resolve` gives them.
    """
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (here / name).resolve() not in leave_out
        )
        yield from (here / name for name in sorted(names) if not name.startswith("."))


def check_folder_is_writable(folder: Path, flag: str) -> None:
    """Makes a folder if need be, and a file in it that goes again: before hours of work, not after them.

    Raises:
        UserError: naming the flag and the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written ({error.strerror}): give another folder", 2) from error
