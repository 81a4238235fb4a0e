"""Whoever else writes in a cache folder: every other tensor keeps its bytes, every file loads, exit statuses are true."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from masked_loss_triton.cache.safetensors_file import read_header, rewrite
from masked_loss_triton.errors import UserError
from tests.cache.support import Lab, disc


def test_a_cache_that_was_replaced_after_its_header_was_read_is_left_alone(tmp_path):
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    save_file({"latents": torch.randn(64, 64)}, path)
    file = read_header(path)
    save_file({"latents": torch.randn(64, 64)}, other)
    os.replace(other, path)
    new = path.read_bytes()
    with pytest.raises(UserError, match=r"x\.safetensors was written by another program meanwhile"):
        rewrite(file, add={"m": np.ones(3, np.float16)})
    with pytest.raises(UserError, match="was written by another program meanwhile"):
        file.read("latents")
    assert path.read_bytes() == new
    assert os.listdir(tmp_path) == [path.name]


def test_a_cache_that_is_written_in_place_is_left_alone(tmp_path):
    """As the trainer's script does it: the same file, emptied and written anew."""
    path = tmp_path / "x.safetensors"
    save_file({"latents": torch.randn(64, 64)}, path)
    file = read_header(path)
    with open(path, "r+b") as target:
        target.seek(-4, os.SEEK_END)
        target.write(b"data")
    new = path.read_bytes()
    with pytest.raises(UserError, match="was written by another program meanwhile"):
        rewrite(file, add={"m": np.ones(3, np.float16)})
    assert path.read_bytes() == new


def test_two_runs_with_other_options_keep_the_latents(tmp_path):
    lab = Lab(tmp_path)
    before = {}
    for i in range(16):
        lab.picture(f"p{i}", mask=disc((160, 120), (i / 16, 0.5)))
        path = lab.add_cache(f"p{i}", extra={"filler_float32": torch.randn(100, 100)})
        before[path] = load_file(path)
    command = [sys.executable, "-m", "masked_loss_triton", "cache", "--dataset_config", str(lab.toml), "--arch", "wan"]
    options = [("--mask_dilate", "1"), ("--mask_dilate", "9"), ("--dtype", "float32"), ("--remove",)]
    processes = [
        subprocess.Popen([*command, "--mask_directory", str(lab.masks), *option], stderr=subprocess.PIPE, text=True)
        for option in options
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert "Traceback" not in "".join(said)
    for path, tensors in before.items():
        loaded = load_file(path)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert sorted(os.listdir(lab.cache)) == sorted(path.name for path in before)
