"""Keeps what a session of the editor replaces, so that one step brings it back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from masked_loss_triton.files.atomic import replace_file, temporary_name
from masked_loss_triton.generate.batches import COPIES

ABSENT = ".was-absent"  # ends the name of an empty file that stands for a mask that did not exist


class Copies:
    """Copies of masks as they were before a session first changed them, in `.replaced-masks/SESSION` beside the masks."""

    def __init__(self, session: str) -> None:
        self.session = session

    def place(self, path: Path) -> Path:
        """Where the copy of a mask goes."""
        return path.parent / COPIES / self.session / path.name

    def keep(self, path: Path) -> None:
        """Copies a mask, file or folder, unless the session has done so before."""
        copy = self.place(path)
        absent = copy.with_name(copy.name + ABSENT)
        if os.path.lexists(copy) or absent.exists():
            return
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            building = temporary_name(copy)
            shutil.copytree(path, building)
            os.replace(building, copy)
        elif path.exists():
            replace_file(copy, lambda data: data.write(path.read_bytes()))
            shutil.copystat(path, copy)
        else:
            absent.touch()

    def take_away(self, path: Path) -> None:
        """Moves a mask to the copies, beside those that are there."""
        if os.path.lexists(path):
            copy = self.place(path)
            copy.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, _free(copy))

    def restore(self, paths: Collection[Path]) -> bool:
        """Brings masks back to what they were; what is there now goes to the copies. False where the session changed none."""
        changed = False
        for path in paths:
            copy = self.place(path)
            absent = copy.with_name(copy.name + ABSENT)
            if not os.path.lexists(copy) and not absent.exists():
                continue
            changed = True
            if os.path.lexists(path):
                os.replace(path, _free(copy.with_name(f"reverted-{copy.name}")))
            if os.path.lexists(copy):
                os.replace(copy, path)
            absent.unlink(missing_ok=True)
        return changed


def _free(path: Path) -> Path:
    """The path, or with a number in front of its name where something has that name."""
    free, number = path, 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{number}-{path.name}")
    return free
