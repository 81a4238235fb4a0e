"""Rewriting a safetensors file keeps every byte of the others, and a broken file is reported and left alone."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from masked_loss_triton.cache.safetensors_file import read_header, rewrite
from masked_loss_triton.errors import UserError
from tests.cache.support import read

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.uint8, torch.bool]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tensors")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), max_size=6),
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda key: key != "mask_source"), st.text(max_size=8), max_size=3
    ),
    st.sampled_from([np.float16, np.float32]),
    st.integers(1, 9),
)
def test_adding_keeps_the_others_and_removing_gives_the_old_file_back(folder, shapes, metadata, dtype, count):
    path = folder / "x.safetensors"
    tensors = {f"t{i}": (torch.randn(shape) * 100).to(kind) for i, (kind, shape) in enumerate(shapes)}
    save_file(tensors, path, metadata=metadata or None)
    before = path.read_bytes()
    added = np.random.default_rng(0).random(count).astype(dtype)
    file = read_header(path)
    rewrite(file, add={"mask": added}, metadata={**file.metadata, "mask_source": "file"})
    after, meta = read(path)
    assert meta == {**metadata, "mask_source": "file"}
    assert set(after) == {*tensors, "mask"}
    assert np.array_equal(after.pop("mask").numpy(), added)
    for name, tensor in tensors.items():
        assert after[name].dtype == tensor.dtype
        assert after[name].shape == tensor.shape
        bits = [one.reshape(-1, 1).view(torch.uint8) for one in (after[name], tensor)]
        assert torch.equal(*bits)
    file = read_header(path)
    rewrite(file, drop={"mask"}, metadata={key: file.metadata[key] for key in file.metadata if key != "mask_source"})
    assert path.read_bytes() == before


def test_every_tensor_stays_aligned(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(3), "b": torch.zeros(3, dtype=torch.uint8), "c": torch.zeros(2).half()}, path)
    rewrite(read_header(path), add={"m": np.ones(5, np.float16), "n": np.ones(3, np.float32)})
    file = read_header(path)
    sizes = {"F32": 4, "F16": 2, "U8": 1}
    for entry in file.tensors.values():
        assert (file.data_start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0


def broken(good: bytes):
    length = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + length])
    yield from (good[:cut] for cut in (0, 3, 8, 8 + length // 2, 8 + length, len(good) - 1))
    yield good + b"x"
    yield (10**15).to_bytes(8, "little") + good[8:]
    yield good[:8] + b"\xff" + good[9:]

    def with_header(value) -> bytes:
        text = json.dumps(value).encode()
        return len(text).to_bytes(8, "little") + text + good[8 + length :]

    yield with_header([])
    yield with_header({"latents": 3})
    yield with_header({**header, "latents": {**header["latents"], "shape": [9, 9]}})
    yield with_header({**header, "latents": {**header["latents"], "data_offsets": [8, 4]}})
    yield with_header({**header, "latents": {"dtype": "F32"}})


def test_a_broken_file_is_named_and_left_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"latents": torch.randn(4, 8)}, path)
    cases = list(broken(path.read_bytes()))
    assert len(cases) == 14
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(UserError) as caught:
            read_header(path)
        assert str(path) in str(caught.value)
        assert "caching script again" in str(caught.value)
        assert path.read_bytes() == case
    with pytest.raises(UserError, match=r"absent.*cannot be read"):
        read_header(tmp_path / "absent.safetensors")


def test_links_and_permissions_stay(tmp_path):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    save_file({"latents": torch.randn(4, 8)}, real)
    os.chmod(real, 0o640)
    link.symlink_to(real.name)
    rewrite(read_header(link), add={"m": np.ones(3, np.float16)})
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert set(load_file(real)) == {"latents", "m"}
    assert sorted(os.listdir(tmp_path)) == ["link.safetensors", "real.safetensors"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"latents": torch.randn(64, 64)}, path)
    before = path.read_bytes()
    # A real failing write: the kernel refuses to let files of this process grow over 8 KiB.
    code = f"""
import resource, signal, numpy as np
from masked_loss_triton.cache.safetensors_file import read_header, rewrite
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, {resource.RLIM_INFINITY}))
try:
    rewrite(read_header({str(path)!r}), add={{"m": np.ones(3, np.float16)}})
except Exception as error:
    print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith(f"UserError {path} cannot be written (File too large)"), result
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]
