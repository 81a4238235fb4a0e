"""Adding tensors to a safetensors file and taking them out, without touching a byte of the others.

The file is never changed in place: whatever happens, its name holds the old or the new contents.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import identity, replace_file
from masked_loss_triton.masks.reading import check_is_file

MAX_HEADER = 100_000_000  # the limit of the safetensors library
ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
NUMPY_NAMES = {"float16": "F16", "float32": "F32"}


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
            UserError: when the file was replaced or written since its header was read.
        """
        entry = self.tensors[name]
        begin, end = entry["data_offsets"]
        with open(self.path, "rb") as file:
            file.seek(self.data_start + begin)
            data = file.read(end - begin)
            self.check_unchanged(file)
        if entry["dtype"] == "BF16":
            # bfloat16 is the upper half of a float32.
            return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])
        dtype = {"F16": np.float16, "F32": np.float32, "I32": np.int32}[entry["dtype"]]
        return np.frombuffer(data, dtype).reshape(entry["shape"])

    def check_unchanged(self, file: BinaryIO) -> None:
        """Compares an open file, and what the name leads to now, with the file whose header was read.

        Raises:
            UserError: when they differ.
        """
        if any(identity(status) != self.identity for status in (os.fstat(file.fileno()), os.stat(self.path))):
            raise UserError(
                f"{self.path} was written by another program meanwhile, and is left as it is: run this again"
            )


def read_header(path: str | os.PathLike[str]) -> TensorFile:
    """Reads and checks the header of a safetensors file; its data is not read.

    Raises:
        UserError: naming the file, when it is missing, cut short or no safetensors file.
    """
    try:
        check_is_file(path)
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER, size - 8):
                raise ValueError("its header is incomplete")
            header = json.loads(file.read(length).decode("utf-8"))
        return _checked(Path(path), header, 8 + length, status)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the file and its permissions") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else "its header is damaged"
        raise UserError(
            f"{path} is cut short or damaged ({reason}): delete it and run the caching script again"
        ) from error


def _checked(path: Path, header: dict[str, Any], data_start: int, status: os.stat_result) -> TensorFile:
    metadata_first = next(iter(header), "__metadata__") == "__metadata__"
    metadata = header.pop("__metadata__", None) or {}
    position = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        begin, end = entry["data_offsets"]
        items = math.prod(entry["shape"])
        expected = items * ITEM_BYTES[entry["dtype"]] if entry["dtype"] in ITEM_BYTES else end - begin
        if begin != position or end < begin or end - begin != expected:
            raise ValueError("its tensors do not fit its header")
        position = end
    if data_start + position != status.st_size:
        raise ValueError(f"{status.st_size} bytes instead of {data_start + position}")
    return TensorFile(path, metadata, header, data_start, metadata_first, identity(status))


def rewrite(
    file: TensorFile,
    *,
    drop: set[str] = frozenset(),  # type: ignore[assignment]
    add: dict[str, np.ndarray] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes the file anew without the tensors in `drop`, with those in `add`, and with `metadata` as its metadata.

    Other tensors keep their bytes and their order. The new tensors go where their alignment wants them: before the first
    tensor of smaller items.

    Args:
        file: as `read_header` gave it.
        drop: names of tensors to leave out.
        add: float16 or float32 arrays by name.
        metadata: the whole new metadata; None keeps the old.

    Raises:
        UserError: naming the file, when the disk is full, the folder may not be written, or another program has written
            the file since its header was read. The old file stays.
    """
    new = {name: np.ascontiguousarray(array) for name, array in (add or {}).items()}
    kept = [name for name in file.tensors if name not in drop and name not in new]
    kept.sort(key=lambda name: file.tensors[name]["data_offsets"][0])
    order = list(kept)
    for name, array in new.items():
        smaller = (i for i, other in enumerate(order) if _item_bytes(file, new, other) < array.itemsize)
        order.insert(next(smaller, len(order)), name)

    header: dict[str, Any] = {}
    offset = 0
    for name in order:
        if name in new:
            array = new[name]
            entry = {"dtype": NUMPY_NAMES[str(array.dtype)], "shape": list(array.shape)}
            size = array.nbytes
        else:
            entry = dict(file.tensors[name])
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
        header[name] = {**entry, "data_offsets": [offset, offset + size]}
        offset += size
    # The file's own order of names, so that adding and removing a tensor gives back the same bytes.
    names = [name for name in file.tensors if name in header] + [name for name in new if name not in file.tensors]
    entries = {name: header[name] for name in names}
    meta = file.metadata if metadata is None else metadata
    described = {"__metadata__": meta} if meta else {}
    whole = {**described, **entries} if file.metadata_first else {**entries, **described}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "backslashreplace")
    text += b" " * (-len(text) % 8)

    def write(target: BinaryIO) -> None:
        target.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            if name in new:
                target.write(new[name].data)
            else:
                begin, end = file.tensors[name]["data_offsets"]
                _copy(source, target, file.data_start + begin, end - begin)

    def check() -> None:
        file.check_unchanged(source)
        if os.name == "nt":  # an open file cannot be replaced there
            source.close()

    with open(file.path, "rb") as source:
        file.check_unchanged(source)
        replace_file(file.path, write, before=check, keep_times=True)
        # A program that had opened the old file just before writes on in a file without a name.
        if not source.closed and identity(os.fstat(source.fileno()))[2:4] != file.identity[2:4]:
            raise UserError(f"{file.path} was written by another program at the same moment: run that program again")


def _item_bytes(file: TensorFile, new: dict[str, np.ndarray], name: str) -> int:
    return new[name].itemsize if name in new else ITEM_BYTES.get(file.tensors[name]["dtype"], 1)


def _copy(source: BinaryIO, target: BinaryIO, start: int, length: int) -> None:
    source.seek(start)
    while length:
        block = source.read(min(length, 1 << 22))
        if not block:
            raise OSError(5, "the file became shorter while it was read")
        target.write(block)
        length -= len(block)
