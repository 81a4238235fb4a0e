"""Every model family of the trainer, tiny: caches by its own script, a LoRA by its own training script."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from masked_loss_triton.cache.families import FAMILIES as TABLE
from masked_loss_triton.cache.families import REFUSED
from tests.lab.fixture import CORE, FAMILIES, write_toml
from tests.lab.laboratory import network_module


def test_every_script_of_the_trainer_is_supported_or_refused(musubi):
    scripts = {path.stem for path in (Path(musubi) / "src" / "musubi_tuner").glob("*_train*.py")}
    supported = {script for one in TABLE.values() for script in (one.training_script, *one.whole_model[:1])}
    assert scripts == supported | REFUSED.keys()
    assert {names.arch or name for name, names in FAMILIES.items()} == TABLE.keys(), (
        "each is trained below, or in test_training"
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in CORE])
def test_a_white_mask_is_the_stock_run_and_a_mask_the_trainers_resize(laboratory, family, tmp_path):
    """White through the network module; then masks and a prior through the launcher.

    The LoRA is 0 at the first step, so that teacher and student agree; outside the mask the loss itself has no gradient.
    """
    white = laboratory.cache(family, "masks_white")
    stock = laboratory.train(family, white, masks=False)
    masked = laboratory.train(family, white, "--network_module", network_module(family), masks=False)
    assert masked.lora == stock.lora
    assert masked.losses == pytest.approx(stock.losses, rel=1e-6)
    assert masked.metadata()["ss_use_mask_loss"] == "True"
    assert masked.metadata()["ss_network_module"] == FAMILIES[family].network

    seen = tmp_path / "seen.jsonl"
    pictures = tuple(f"img{i}" for i in range(6)) if "image" in FAMILIES[family].kinds else ()
    observed = {"LAB_OBSERVE": str(seen), "LAB_MASKS": str(laboratory.fixture / "masks")}
    root = laboratory.cache(family, "masks", pictures)
    run = laboratory.train(family, root, "--use_mask_loss", "--inverted_mask_prior", hooks=("observe",), **observed)
    assert run.status == 0, run.output[-3000:]
    steps = [json.loads(line) for line in seen.read_text().splitlines()]
    assert run.losses == pytest.approx([step["expected_loss"] for step in steps], rel=1e-6)
    assert len(steps) == 4
    for step in steps:
        assert step.get("weight_error", 0) <= 1 / 1024  # float16 in the cache
        assert step["outside"] == 0
        assert step["inside"] > 0
    assert steps[0]["prior"] < 1e-5, "of the loss: what bfloat16 leaves between a pass with and one without gradients"
    assert steps[-1]["prior"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("network", ["LoHa", "LoKr", "two experts"])
def test_the_teacher_is_the_same_model_whatever_is_trained(laboratory, network, tmp_path):
    """The adapter is 0 at the first step. The two experts of WAN 2.2 have other weights, far apart if they were mixed up."""
    flags = ["--network_module", f"networks.{network.lower()}"]
    if network == "two experts":
        low = load_file(laboratory.fixture / "weights" / "wan_dit_bf16.safetensors")
        random = torch.Generator().manual_seed(1)
        high = {
            name: value + 0.1 * torch.randn(value.shape, generator=random).bfloat16() for name, value in low.items()
        }
        save_file(high, tmp_path / "high.safetensors")
        flags = [
            "--task",
            "t2v-A14B",
            "--dit_high_noise",
            str(tmp_path / "high.safetensors"),
            "--timestep_boundary",
            "700",
        ]
    seen = tmp_path / "seen.jsonl"
    observed = {"LAB_OBSERVE": str(seen), "LAB_MASKS": str(laboratory.fixture / "masks")}
    root = laboratory.cache("wan", "masks", tuple(f"img{i}" for i in range(6)))
    on = ["--use_mask_loss", "--inverted_mask_prior", *flags]
    run = laboratory.train("wan", root, *on, hooks=("observe",), **observed)
    assert run.status == 0, run.output[-3000:]
    steps = [json.loads(line) for line in seen.read_text().splitlines()]
    assert steps[0]["prior"] < 1e-5
    assert all(0 < step["prior"] < 0.01 for step in steps[1:])


LAYOUTS = ("zimage", "kandinsky5", "hidream")  # without a frame axis, frames first, tokens


@pytest.mark.slow
@pytest.mark.parametrize("family", LAYOUTS)
def test_gradient_checkpointing_learns_the_same(laboratory, family):
    root = laboratory.cache(family, "masks")
    flags = ["--use_mask_loss", "--inverted_mask_prior", "--mask_min_weight", "0.1"]
    plain = laboratory.train(family, root, *flags)
    checkpointed = laboratory.train(family, root, *flags, "--gradient_checkpointing")
    assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-3)


@pytest.mark.slow
def test_hidreams_own_term_goes_on_beside_the_masks(laboratory):
    white = laboratory.cache("hidream", "masks_white")
    flags = ["--dino_loss_weight", "0.5", "--dino_loss_backend", "convnext"]
    hooks = ("perceptual_term",)
    stock = laboratory.train("hidream", white, *flags, masks=False, hooks=hooks)
    masked = laboratory.train("hidream", white, "--use_mask_loss", *flags, hooks=hooks)
    without = laboratory.train("hidream", white, "--use_mask_loss")
    assert masked.lora == stock.lora != without.lora
    assert masked.losses == pytest.approx(stock.losses, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, entry in TABLE.items() if entry.whole_model])
def test_whole_models_are_trained_with_masks(laboratory, family, tmp_path):
    """In float32 a white mask is the stock script bit for bit; in bfloat16 the script rounds its loss, and ours is not rounded."""
    script = ("--script", TABLE[family].whole_model[0])
    white = laboratory.cache(family, "masks_white")
    stock = laboratory.train(family, white, *script, masks=False, steps=2)
    masked = laboratory.train(family, white, *script, "--use_mask_loss", steps=2)
    assert masked.lora == stock.lora
    assert masked.losses == pytest.approx(stock.losses, rel=1e-6)
    seen = tmp_path / "seen.jsonl"
    observed = {"LAB_OBSERVE": str(seen), "LAB_MASKS": str(laboratory.fixture / "masks")}
    root = laboratory.cache(family, "masks", tuple(f"img{i}" for i in range(6)))
    on = (*script, "--use_mask_loss", "--full_bf16")
    run = laboratory.train(family, root, *on, hooks=("observe",), steps=2, **observed)
    assert run.status == 0, run.output[-3000:]
    steps = [json.loads(line) for line in seen.read_text().splitlines()]
    assert run.losses == pytest.approx([step["expected_loss"] for step in steps], rel=1e-6)
    for step in steps:
        assert step["outside"] == 0
        assert step["inside"] > 0
    refused = laboratory.train(family, root, *script, "--use_mask_loss", "--inverted_mask_prior")
    assert refused.status == 2
    assert "--inverted_mask_prior needs a LoRA that can be switched off" in refused.output
    assert "Loading" not in refused.output


@pytest.mark.slow
def test_the_frame_that_is_given_counts_or_not(laboratory, tmp_path):
    """Image to video: with `ignore` the loss, recomputed in float64, is that of the other frames, and the first has no gradient."""
    root = laboratory.cache("wan_i2v", "masks")
    observed = {"LAB_OBSERVE": str(tmp_path / "seen.jsonl"), "LAB_MASKS": str(laboratory.fixture / "masks")}
    prior = ("--use_mask_loss", "--inverted_mask_prior")
    found = {}
    for how in ("keep", "ignore"):
        seen = Path(observed["LAB_OBSERVE"])
        seen.unlink(missing_ok=True)
        run = laboratory.train("wan_i2v", root, *prior, "--mask_given_frames", how, hooks=("observe",), **observed)
        assert run.status == 0, run.output[-3000:]
        found[how] = [json.loads(line) for line in seen.read_text().splitlines()]
        assert run.losses == pytest.approx([step["expected_loss"] for step in found[how]], rel=1e-6)
        assert run.metadata()["ss_mask_given_frames"] == how
    assert all("given" not in step for step in found["keep"])
    clips = [step for step in found["ignore"] if step["shapes"][0][2] > 1]  # a clip of one frame has no other to learn
    assert clips
    assert all(step["given"] == 0 < step["inside"] for step in clips)
    assert all(step["shapes"][1][2] == step["shapes"][0][2] - 1 for step in clips)
    assert all("given" not in step for step in found["ignore"] if step not in clips)


@pytest.mark.slow
def test_labels_are_weighed_when_training_starts(laboratory, tmp_path):
    """Weights of labels change nothing in the caches, and give the LoRA that a plain mask of the same weights gives."""
    stems = tuple(f"img{index}" for index in range(4))
    left, right = np.zeros((2, 256, 256), np.uint8)
    left[:, :128] = right[:, 128:] = 255
    roots = {}
    for name, masks in {
        "labels": {"left": left, "right": right},
        "plain": {"": left},
        "white": {"": left | right},
    }.items():
        roots[name] = shutil.copytree(laboratory.cache("wan", "", stems), tmp_path / name)
        (roots[name] / "drawn").mkdir()
        for label, pixels in masks.items():
            for stem in stems:
                Image.fromarray(pixels).save(roots[name] / "drawn" / f"{stem}{label and '.'}{label}.png")
        toml = write_toml(
            roots[name] / "masks.toml", laboratory.fixture, roots[name], ["image"], images=roots[name] / "pictures"
        )
        labels = ["--mask_labels", "left", "right"] if name == "labels" else []
        masks_of = ["--masks", roots[name] / "drawn", *labels]
        command = [sys.executable, "-m", "masked_loss_triton", "cache", "--dataset_config", toml, *masks_of]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
    before = {path: path.read_bytes() for path in (roots["labels"] / "image").iterdir()}

    def train(name, *flags):
        run = laboratory.train("wan", roots[name], "--use_mask_loss", *flags)
        assert run.status == 0, run.output[-3000:]
        return run

    plain, white = train("plain"), train("white")
    left_alone = train("labels", "--mask_weights", "left=2", "right=0")
    assert left_alone.lora == plain.lora
    assert "labels weigh, in units of the largest weight: left 1, right 0" in left_alone.output
    assert train("labels", "--mask_weights", "left=1", "right=1").lora == white.lora != plain.lora
    assert train("labels", "--mask_weights", "left=1", "right=0.5").lora not in (white.lora, plain.lora)
    assert before == {path: path.read_bytes() for path in (roots["labels"] / "image").iterdir()}
    wrong = laboratory.train("wan", roots["labels"], "--use_mask_loss", "--mask_weights", "lft=1")
    assert wrong.status != 0
    assert "Loading" not in wrong.output
