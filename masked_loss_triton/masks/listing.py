"""Lists the pictures of a folder tree, and the masks of each, for commands that write files for each: no two of one stem."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.folders import walk_files
from masked_loss_triton.masks.frames import MASK_EXTENSIONS
from masked_loss_triton.masks.labels import parse_labels
from masked_loss_triton.masks.reading import UNREAD_EXTENSIONS
from masked_loss_triton.masks.sources import MaskDirectory

PLAIN = ""  # in place of a label: the plain mask of a picture


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


def labels_beside(files: Iterable[Path], directories: Mapping[Path, MaskDirectory]) -> tuple[str, ...]:
    """Returns the labels of which there are masks for pictures, as NAME.LABEL.png, sorted."""
    stems: dict[Path, set[str]] = {}
    for file in files:
        stems.setdefault(file.parent, set()).add(file.stem)
    found = set()
    for folder, directory in directories.items():
        for stem in directory.stills:
            name, _, label = stem.rpartition(".")
            if name in stems[folder] and stem not in stems[folder]:
                found.add(label)
    return tuple(sorted(label for label in found if _is_label(label)))


def _is_label(text: str) -> bool:
    try:
        return parse_labels([text]) == (text,)
    except ValueError:
        return False


def masks_by_label(file: Path, labels: Iterable[str], directory: MaskDirectory | None, folder: Path) -> dict[str, Path]:
    """The masks of a picture, NAME.png as `PLAIN` first, then NAME.LABEL.png.

    Args:
        directory: the masks of the picture's folder; None where there is no such folder.
        folder: for the error, where that is.

    Raises:
        UserError: where the picture has none.
    """
    names = {PLAIN: file.stem, **{label: f"{file.stem}.{label}" for label in labels}}
    found = {label: directory.find(name, video=False) if directory else None for label, name in names.items()}
    paths = {label: path for label, path in found.items() if path is not None}
    if not paths:
        raise UserError(f"{file} has no mask in {folder}: add {file.stem}.png")
    return paths
