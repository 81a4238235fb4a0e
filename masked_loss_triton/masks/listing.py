"""Lists the pictures of a folder tree for commands that write one file for each: no two of one stem."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.folders import walk_files
from masked_loss_triton.masks.frames import MASK_EXTENSIONS
from masked_loss_triton.masks.reading import UNREAD_EXTENSIONS


@dataclasses.dataclass(frozen=True)
class Listing:
    """Pictures, one line for each that has the same stem as another, and how many files of each kind are not read."""

    files: list[Path]
    problems: dict[Path, str]
    unread: Counter[str]


def list_pictures(images: Path, leave_out: Iterable[Path] = ()) -> Listing:
    """Lists the pictures below a folder, in the order of their names.

    Args:
        images: the folder.
        leave_out: folders that may be below it and are not entered: masks, the output.

    Raises:
        UserError: when there are none.
    """
    first: dict[Path, Path] = {}
    problems: dict[Path, str] = {}
    unread: Counter[str] = Counter()
    for file in walk_files(images, {folder.resolve() for folder in leave_out}):
        kind = file.suffix.lower()
        if kind in UNREAD_EXTENSIONS:
            unread[kind] += 1
        if kind not in MASK_EXTENSIONS:
            continue
        other = first.setdefault(file.parent / file.stem, file)
        if other is not file:
            problems[file] = f"{file} has the same stem as {other.name}: rename one of them"
    if not first:
        raise UserError(f"--images {images} has no pictures in it", 2)
    return Listing(list(first.values()), problems, unread)


def check_three_folders(images: Path, masks: Path, output: Path) -> None:
    """Raises UserError where two of them are one folder."""
    if len({folder.resolve() for folder in (images, masks, output)}) < 3:
        raise UserError("--images, --masks and --output must be three folders", 2)
