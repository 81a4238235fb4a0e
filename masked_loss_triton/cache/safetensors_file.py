"""Adding tensors to a safetensors file and taking them out, without touching a byte of the others.

The file is never changed in place: whatever happens, its name holds the old or the new contents. It is written anew only
from the file whose header was read: what another program puts in its place meanwhile stays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from masked_loss_triton.cache.safetensors_header import ITEM_BITS, LARGEST_HEADER, METADATA, parse_header
from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import changed_meanwhile, identity, replace_file
from masked_loss_triton.masks.reading import check_is_file

NUMPY_NAMES = {"float16": "F16", "float32": "F32"}
BLOCK = 1 << 22  # bytes that are read at once


@dataclasses.dataclass
class TensorFile:
    """The header of a safetensors file.

    Attributes:
        path: the file.
        metadata: its `__metadata__`, in the file's order.
        tensors: name to {"dtype", "shape", "data_offsets"}, in the file's order.
        data_start: where the data begins, bytes.
        metadata_first: whether `__metadata__` stands before the tensors.
        identity: of the file that the header was read from: there may be another one of the same name later.
    """

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]
    data_start: int
    metadata_first: bool = True
    identity: tuple[int, ...] = ()

    def read(self, name: str) -> np.ndarray:
        """One tensor as a numpy array: float16, float32 and int32 as they are, bfloat16 as float32.

        Raises:
            UserError: for another dtype, and when the file was replaced or written since its header was read.
        """
        entry = self.tensors[name]
        with self.open() as file:
            data = b"".join(self.blocks(file, name))
            self.check_unchanged(file)
        if entry["dtype"] == "BF16":
            # bfloat16 is the upper half of a float32.
            return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
        dtype = {"F16": np.float16, "F32": np.float32, "I32": np.int32}.get(entry["dtype"])
        if dtype is None:
            raise UserError(f"{self.path}: {name} is {entry['dtype']}, which is not read: no trainer writes that")
        return np.frombuffer(data, dtype).reshape(entry["shape"])

    def open(self) -> BinaryIO:
        """Opens the file whose header was read.

        Raises:
            UserError: when it cannot be opened, or was replaced or written since.
        """
        try:
            file = open(self.path, "rb")  # noqa: SIM115
        except OSError as error:
            raise _unreadable(self.path, error) from error
        try:
            self.check_unchanged(file)
        except BaseException:
            file.close()
            raise
        return file

    def blocks(self, file: BinaryIO, name: str) -> Iterator[bytes]:
        """Reads the bytes of one tensor, a few at a time."""
        begin, end = self.tensors[name]["data_offsets"]
        file.seek(self.data_start + begin)
        while begin < end:
            block = file.read(min(end - begin, BLOCK))
            if not block:
                raise changed_meanwhile(self.path)
            begin += len(block)
            yield block

    def check_unchanged(self, file: BinaryIO) -> None:
        """Compares an open file with the file whose header was read.

        Raises:
            UserError: when they differ.
        """
        if identity(os.fstat(file.fileno())) != self.identity:
            raise changed_meanwhile(self.path)

    def fingerprint(self, names: Iterable[str]) -> str:
        """A sha256 of the names, dtypes, shapes and bytes of some tensors, wherever they lie in the file. Reads them."""
        sums = {}
        with self.open() as file:
            for name in names:
                digest = hashlib.sha256()
                for block in self.blocks(file, name):
                    digest.update(block)
                sums[name] = digest.hexdigest()
            self.check_unchanged(file)
        return self._combine(sums)

    def _combine(self, sums: dict[str, str]) -> str:
        entries = [
            [name, self.tensors[name]["dtype"], self.tensors[name]["shape"], sums[name]] for name in sorted(sums)
        ]
        return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def read_header(path: str | os.PathLike[str]) -> TensorFile:
    """Reads and checks the header of a safetensors file; its data is not read.

    Raises:
        UserError: naming the file, when it is missing, cut short or no safetensors file.
    """
    try:
        check_is_file(path)
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(LARGEST_HEADER, status.st_size - 8):
                raise ValueError("its header is incomplete")
            header = parse_header(file.read(length), status.st_size - 8 - length)
        return TensorFile(
            Path(path), header.metadata, header.tensors, 8 + length, header.metadata_first, identity(status)
        )
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        reason = str(error) if type(error) is ValueError else "its header is damaged"
        raise UserError(
            f"{path} is cut short or damaged ({reason}): if no program is writing it now, delete it and run the caching "
            "script again"
        ) from error


def _unreadable(path: str | os.PathLike[str], error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): check the file and its permissions")


def rewrite(
    file: TensorFile,
    *,
    drop: set[str] = frozenset(),  # type: ignore[assignment]
    add: dict[str, np.ndarray] | None = None,
    metadata: dict[str, str] | None = None,
    fingerprint: str | None = None,
) -> None:
    """Writes the file anew without the tensors in `drop`, with those in `add`, and with `metadata` as its metadata.

    Other tensors keep their bytes and their order. The new tensors go where their alignment wants them: before the first
    tensor of smaller items.

    Args:
        file: as `read_header` gave it.
        drop: names of tensors to leave out.
        add: float16 or float32 arrays by name.
        metadata: the whole new metadata; None keeps the old.
        fingerprint: a key of the metadata that gets `TensorFile.fingerprint` of the tensors that stay. Where the file has
            one already it has to be the same.

    Raises:
        UserError: naming the file, when the disk is full, the folder may not be written, another program has written the
            file since its header was read, or its tensors are not those of the fingerprint. The old file stays.
    """
    new = {name: np.ascontiguousarray(array) for name, array in (add or {}).items()}
    order = _order(file, drop, new)
    meta = dict(file.metadata if metadata is None else metadata)
    if fingerprint is not None:
        meta[fingerprint] = "0" * 64

    def write(target: BinaryIO) -> None:
        target.write(_header(file, order, new, meta))
        sums = {}
        with file.open() as source:
            for name in order:
                digest = hashlib.sha256()
                for block in [new[name].data] if name in new else file.blocks(source, name):
                    target.write(block)
                    if fingerprint is not None and name not in new:
                        digest.update(block)
                if name not in new:
                    sums[name] = digest.hexdigest()
            file.check_unchanged(source)
        if fingerprint is not None:
            meta[fingerprint] = file._combine(sums)
            if meta[fingerprint] != file.metadata.get(fingerprint, meta[fingerprint]):
                raise UserError(
                    f"{file.path} is damaged: its tensors are not those that were masked. Delete it and run the caching "
                    "script again; if a program changed them on purpose, take the masks out first (--remove)"
                )
            target.seek(0)
            target.write(_header(file, order, new, meta))

    replace_file(file.path, write, expected=file.identity, keep_times=True)


def _order(file: TensorFile, drop: set[str], new: dict[str, np.ndarray]) -> list[str]:
    """The names of all tensors in the order of their data."""

    def item_bits(name: str) -> int:
        return 8 * new[name].itemsize if name in new else ITEM_BITS[file.tensors[name]["dtype"]]

    order = [name for name in file.tensors if name not in drop and name not in new]
    order.sort(key=lambda name: file.tensors[name]["data_offsets"])
    for name in new:
        smaller = (i for i, other in enumerate(order) if item_bits(other) < item_bits(name))
        order.insert(next(smaller, len(order)), name)
    return order


def _header(file: TensorFile, order: list[str], new: dict[str, np.ndarray], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name in order:
        if name in new:
            entry = {"dtype": NUMPY_NAMES[str(new[name].dtype)], "shape": list(new[name].shape)}
            size = new[name].nbytes
        else:
            entry = file.tensors[name]
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
        entries[name] = {**entry, "data_offsets": [offset, offset + size]}
        offset += size
    # The file's own order of names, so that adding and removing a tensor gives back the same bytes.
    names = [name for name in file.tensors if name in entries] + [name for name in new if name not in file.tensors]
    tensors = {name: entries[name] for name in names}
    described = {METADATA: metadata} if metadata else {}
    whole = {**described, **tensors} if file.metadata_first else {**tensors, **described}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
