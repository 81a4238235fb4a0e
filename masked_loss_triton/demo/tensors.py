"""Safetensors files that are the same, byte for byte, from run to run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file with its metadata in the order given.

    The library's own `save_file` writes metadata in the order of a hash table, which differs from process to process.
    """
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    length = int.from_bytes(content[:8], "little")
    header = json.dumps({"__metadata__": dict(metadata), **json.loads(content[8 : 8 + length])}).encode()
    header += b" " * (-len(header) % 8)  # the data begins at a multiple of 8 bytes
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
