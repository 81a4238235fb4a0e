"""Captions that go along with pictures: copied beside the new picture, and never over another text."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import NO_FILE, replace_file


@dataclasses.dataclass(frozen=True)
class CaptionCopy:
    """A caption, and where it is to be copied."""

    source: Path
    target: Path
    replace: bool = False

    def run(self) -> None:
        """Copies text and mode. Raises UserError where the caption cannot be written, or another one came meanwhile."""
        content = self.source.read_bytes()
        replace_file(self.target, lambda file: file.write(content), expected=None if self.replace else NO_FILE)
        shutil.copymode(self.source, self.target)


def check_extension(extension: str) -> None:
    """Raises UserError for what ends no file name."""
    if not extension.strip(".") or set(extension) & set("/\\\0"):
        raise UserError(f"--captions {extension!r} is not an extension: write for example .txt", 2)


def caption_of(picture: Path, extension: str) -> Path:
    """The caption beside a picture, whether or not there is one."""
    return picture.with_name(f"{picture.stem}.{extension.lstrip('.')}")


def copy_of_caption(caption: Path, target: Path, remedy: str, replace: bool = False) -> CaptionCopy | None:
    """What is to be copied; None where the same text is there already.

    Args:
        caption: the file.
        target: the copy.
        remedy: what to do about another text there, as the end of the error.
        replace: write over another text.

    Raises:
        UserError: for another text in its place; nothing is written yet.
    """
    if target.exists() and not replace:
        try:
            same = target.read_bytes() == caption.read_bytes()
        except OSError as error:
            raise UserError(f"{error.filename} cannot be opened ({error.strerror}): replace or remove it") from error
        if same:
            return None
        raise UserError(f"{target} is already there: {remedy}")
    return CaptionCopy(caption, target, replace)
