"""The report folder: built beside its place under another name, and moved there once it is complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from masked_loss_triton.cache.safetensors_file import read_header, rewrite
from masked_loss_triton.errors import UserError

REPORT = "report.json"
MADE_BY = "masked-loss demo"  # what report.json says of itself, and what allows the folder to be replaced


def check_output(output: Path) -> Path:
    """The absolute path of the report folder, if it may be written.

    Raises:
        UserError: it is a file, or holds something that is not a former report.
    """
    output = output.resolve()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output.name}: a file of that name is in the way", 2)
    if output.is_dir() and any(output.iterdir()) and not _is_report(output):
        raise UserError(
            f"--output {output.name}: the folder is not empty and not a former report; give another, or empty it", 2
        )
    return output


def _is_report(folder: Path) -> bool:
    try:
        return json.loads((folder / REPORT).read_text(encoding="utf-8"))["made_by"] == MADE_BY
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def complete_folder(output: Path) -> Iterator[Path]:
    """Gives a new folder beside `output` to write in. Moves it to `output` at the end, in place of a former report;
    removes it if anything goes wrong, so that `output` is always a whole report or what it was."""
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    former = output.with_name(f".{output.name}.{os.getpid()}.former")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output {output.name}: {output.parent} cannot be written ({error.strerror})", 2) from error
    try:
        yield partial
        if output.exists():
            output.rename(former)
        partial.rename(output)
    except BaseException:
        if former.exists() and not output.exists():
            former.rename(output)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(former, ignore_errors=True)


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whose bytes are the same in every run; the library's own order of metadata is not."""
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    rewrite(read_header(path), add=dict(arrays), metadata=dict(metadata))
