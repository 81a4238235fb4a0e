"""One denominator over processes and micro-batches: what is trained is what one large batch trains."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.integration.musubi.small_trainer import by_item, trained
from tests.support.caches import caches


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Three pictures of one size: a large mask, a small one, none of it white. Text of one length, as a batch needs it."""
    made = caches(tmp_path_factory.mktemp("lab"), "wan", stems="abc")
    Image.fromarray(np.zeros((128, 128), np.uint8)).save(made.masks / "c.png")
    assert made.run("cache", "--masks", made.masks) == 0
    return made


def difference(one: list[torch.Tensor], two: list[torch.Tensor]) -> float:
    largest = max(float(value.abs().max()) for value in one)
    assert largest > 0
    return max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) / largest


def gradients(lab, *flags, **changes):
    return trained("method", lab, "--use_mask_loss", *flags, **by_item(), **changes).gradients


MODES = [
    (),
    ("--mask_normalization", "mean_one"),
    ("--mask_normalization", "mean"),
    ("--normalize_per_sample",),
    ("--normalize_per_sample", "--inverted_mask_prior"),
    ("--mask_normalization", "mean", "--inverted_mask_prior"),
    ("--mask_min_weight", "0.1", "--loss_type", "huber"),
    ("--mask_probability", "0"),
]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("flags", MODES, ids=" ".join)
def test_micro_batches_are_the_large_batch(lab, flags, count):
    whole = gradients(lab, *flags, batch_size=count, max_train_steps=1)
    split = [*flags, "--gradient_accumulation_steps", count]
    parts = gradients(lab, *split, "--mask_normalize_across", "accumulation", batch_size=1, max_train_steps=1)
    assert difference(whole[0], parts[0]) < 1e-5
    if not flags or flags[0] == "--mask_min_weight":
        alone = gradients(lab, *split, batch_size=1, max_train_steps=1)
        assert difference(whole[0], alone[0]) > 0.05


def test_every_window_starts_anew(lab):
    flags = ["--gradient_accumulation_steps", 3, "--mask_normalize_across", "accumulation"]
    windows = gradients(lab, *flags, batch_size=1, max_train_steps=2, learning_rate=0.0)
    assert difference(windows[0], windows[1]) == 0


def test_the_logged_loss_of_equal_micro_batches_is_their_own(lab):
    flags = ["--use_mask_loss", "--mask_probability", 0, "--gradient_accumulation_steps", 3]
    alone = trained("method", lab, *flags, **by_item(), batch_size=1, max_train_steps=1)
    shared = trained(
        "method", lab, *flags, "--mask_normalize_across", "accumulation", **by_item(), batch_size=1, max_train_steps=1
    )
    assert shared.losses == pytest.approx(alone.losses, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--mask_normalize_across", "world", "--inverted_mask_prior"),
        ("--mask_normalize_across", "world", "--mask_probability", "0.5"),
        ("--mask_normalize_across", "accumulation", "--gradient_accumulation_steps", "2"),
        ("--mask_normalize_across", "rank"),
    ],
    ids=lambda flags: " ".join(flags[1:]),
)
def test_two_processes_are_one(tmp_path_factory, tmp_path, flags):
    lab = caches(tmp_path_factory.mktemp("lab"), "wan", stems="abce")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_addr", "127.0.0.1"]
    command += ["--master_port", port, "-m", "tests.integration.musubi.one_rank", "wan", lab.cache, lab.toml]
    command += [tmp_path / "gradients", "--use_mask_loss", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "examples", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = [torch.load(tmp_path / f"gradients.{rank}") for rank in (0, 1)]
    counts = [json.loads((tmp_path / f"gradients.{rank}.json").read_text()) for rank in (0, 1)]
    assert counts[0] == counts[1]  # the same batches were masked on both
    size = 4 if "accumulation" in flags else 2
    alone = [flag for flag in flags if not flag.startswith("--mask_normalize")][1:]
    if "accumulation" in flags:
        alone = []
    one = gradients(lab, *alone, batch_size=size, max_train_steps=2)
    for step in (0, 1):
        assert difference(two[0][step], two[1][step]) == 0
        if "rank" in flags:
            assert difference(one[step], two[0][step]) > 0.05
        else:
            assert difference(one[step], two[0][step]) < 1e-4
    assert "world does nothing" not in done.stdout
