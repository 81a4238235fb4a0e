"""Masked training in the real trainers, end to end: dataset files, caches, flags, training, the saved LoRA."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.lab.fixture import CORE, FAMILIES
from tests.lab.laboratory import network_module

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("family", CORE)
def test_a_white_mask_is_the_stock_run(laboratory, family):
    root = laboratory.cache(family, "masks_white")
    stock = laboratory.train(family, root, masks=False, steps=8)
    masked = laboratory.train(family, root, "--use_mask_loss", steps=8)
    assert masked.lora == stock.lora
    assert masked.losses == pytest.approx(stock.losses, rel=1e-6)
    assert "masks are on" in masked.output


@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("way", ["launcher", "network module"])
def test_weights_are_the_trainers_resize_and_nothing_is_learned_outside(laboratory, family, way, tmp_path):
    root = laboratory.cache(family, "masks", tuple(f"img{i}" for i in range(6)))
    seen = tmp_path / "seen.jsonl"
    flags = ["--use_mask_loss"] if way == "launcher" else ["--network_module", network_module(family)]
    observed = {"LAB_OBSERVE": str(seen), "LAB_MASKS": str(laboratory.fixture / "masks")}
    run = laboratory.train(family, root, *flags, masks=way == "launcher", hooks=("observe",), **observed)
    assert run.status == 0, run.output[-3000:]
    steps = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(steps) == 4
    for step, logged in zip(steps, run.losses, strict=True):
        assert step["weight_error"] <= 1 / 1024  # float16 in the cache
        assert logged == pytest.approx(step["expected_loss"], rel=1e-6)
        assert step["outside"] == 0
        assert step["inside"] > 0
    assert run.metadata()["ss_network_module"] == FAMILIES[family].network
    assert run.metadata()["ss_use_mask_loss"] == "True"


@pytest.mark.parametrize("family", CORE)
def test_a_prior_of_weight_0_is_none(laboratory, family):
    root = laboratory.cache(family, "masks")
    without = laboratory.train(family, root, "--use_mask_loss")
    zero = laboratory.train(
        family, root, "--use_mask_loss", "--inverted_mask_prior", "--inverted_mask_prior_weight", "0"
    )
    with_prior = laboratory.train(family, root, "--use_mask_loss", "--inverted_mask_prior")
    assert without.lora == zero.lora != with_prior.lora
    assert "does nothing with --inverted_mask_prior_weight 0" in zero.output


@pytest.mark.parametrize("family", [*CORE, "zimage", "kandinsky5", "hidream"])
def test_resumed_is_uninterrupted(laboratory, family):
    """Eight steps at once, and four twice. One picture: the trainer starts its epochs, and with them its order, anew."""
    root = laboratory.cache(family, "masks", ("img0",))
    flags = ["--use_mask_loss", "--inverted_mask_prior", "--prior_teacher", "ema", "--prior_ema_decay", "0.5"]
    flags += ["--mask_probability", "0.6", "--save_state", "--save_every_n_epochs", "2"]
    hooks = ("fixed_noise",)
    whole = laboratory.train(family, root, *flags, steps=8, hooks=hooks, batch_size=1, name="whole")
    half = laboratory.train(family, root, *flags, steps=4, hooks=hooks, batch_size=1, name="half")
    state = half.lora_file.parent / "half-state"
    rest = laboratory.train(
        family, root, *flags, "--resume", str(state), steps=4, hooks=hooks, batch_size=1, name="rest"
    )
    assert half.losses == whole.losses[:4]
    assert rest.losses == whole.losses[4:]
    assert rest.lora == whole.lora
    anew = laboratory.train(
        family, root, *flags[:-5], "--resume", str(state), steps=4, hooks=hooks, batch_size=1, name="anew"
    )
    assert anew.lora != whole.lora  # without --mask_probability


@pytest.mark.parametrize("family", ["wan", "zimage", "kandinsky5", "hidream"])  # one of each layout
@pytest.mark.parametrize("way", ["two processes", "two micro-batches"])
def test_more_than_one_batch_is_the_one_large_batch(laboratory, family, way):
    """The stock trainer sets the measure: its own model differs by about 1e-3 between one batch of two and two of one."""
    root = laboratory.cache(family, "masks", ("img2", "img4"))
    common = ["--optimizer_type", "SGD", "--max_grad_norm", "0", "--learning_rate", "1"]
    parts = {"processes": 2} if way == "two processes" else {}
    split = ["--gradient_accumulation_steps", "2"] if way == "two micro-batches" else []

    def difference(*flags: str, masks: bool = True) -> float:
        hooks = ("frozen_model_on_cpu", "fixed_noise")
        given = {"steps": 1, "masks": masks, "hooks": hooks, "precision": "fp32" if family == "wan" else "bf16"}
        one = laboratory.train(family, root, *common, *flags, batch_size=2, name="one", **given)
        two = laboratory.train(family, root, *common, *flags, *split, batch_size=1, name="two", **parts, **given)
        return relative_difference(one.tensors(), two.tensors())

    stock = difference(masks=False)
    on, across = ["--use_mask_loss"], "accumulation"
    if way == "two processes":
        on, across = [*on, "--inverted_mask_prior"], "world"
    assert stock < (5e-3 if family == "wan" else 5e-2)  # the others run in bfloat16 alone
    # Kandinsky 5 runs the pictures of a batch one by one: its two ways to train agree to the last bit.
    assert difference(*on, "--mask_normalize_across", across) < max(2 * stock, 5e-3)
    assert difference(*on) > 10 * max(stock, 1e-3)


def relative_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Of the up weights, which start at 0: largest difference over largest value."""
    ups = [name for name in one if "lora_up" in name]
    largest = max(float(one[name].abs().max()) for name in ups)
    assert largest > 0
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in ups) / largest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask_gamma", "0"], "--mask_gamma must be > 0"),
        (["--mask_blur_kernel_size", "4"], "--mask_blur_kernel_size must be 0 (off) or an odd integer"),
        (["--inverted_mask_prior", "--prior_decay_schedule", "linear"], "add --normalize_per_sample"),
    ],
)
@pytest.mark.parametrize("family", CORE)
def test_bad_flags_fail_before_anything_is_loaded(laboratory, family, flags, message):
    run = laboratory.train(family, laboratory.cache(family, "masks"), "--use_mask_loss", *flags)
    assert run.status == 2
    lines = [line for line in run.output.splitlines() if line.startswith("masked-loss train:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Loading" not in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("family", CORE)
def test_caches_without_masks_fail_before_anything_is_loaded(laboratory, family):
    root = laboratory.cache(family, "")
    run = laboratory.train(family, root, "--use_mask_loss")
    assert run.status == 1
    assert "latent caches have no mask" in run.output
    assert f"masked-loss cache --dataset_config {root}/train_2.toml --arch {family}" in run.output
    assert "Loading" not in run.output
    stock = laboratory.train(family, root, masks=False)
    off = laboratory.train(family, root)
    assert off.lora == stock.lora
    assert "masks are not used" in off.output


def test_help_and_config_file_know_the_flags(laboratory, musubi, tmp_path):
    root = laboratory.cache("wan", "masks")
    command = [sys.executable, "-m", "masked_loss_triton", "train", "--musubi", musubi, "hv", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert "--prior_timestep_threshold" in shown
    assert "--blocks_to_swap" in shown
    config = tmp_path / "config.toml"
    config.write_text("[mask]\nuse_mask_loss = true\nmask_gamma = 0.5\n")
    by_file = laboratory.train("wan", root, "--config_file", str(config))
    by_flag = laboratory.train("wan", root, "--use_mask_loss", "--mask_gamma", "0.5")
    assert by_file.lora == by_flag.lora
    assert by_file.metadata()["ss_mask_gamma"] == "0.5"


def test_numbers_and_a_picture_reach_the_trainers_own_log(laboratory, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root = laboratory.cache("wan", "masks", tuple(f"img{i}" for i in range(6)))
    flags = ["--use_mask_loss", "--inverted_mask_prior", "--logging_dir", str(tmp_path), "--log_with", "tensorboard"]
    seen = tmp_path / "seen.jsonl"
    observed = {"LAB_OBSERVE": str(seen), "LAB_MASKS": str(laboratory.fixture / "masks")}
    run = laboratory.train("wan", root, *flags, hooks=("observe",), **observed)
    silent = laboratory.train("wan", root, *flags[:2])
    assert run.lora == silent.lora
    (events,) = (path.parent for path in tmp_path.rglob("events.out*") if "network_train" in path.parts)
    log = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
    read = {name: [event.value for event in log.Scalars(name)] for name in log.Tags()["scalars"]}
    expected = [json.loads(line)["expected_loss"] for line in seen.read_text().splitlines()]
    assert read["loss/current"] == pytest.approx(expected, rel=1e-6)
    assert len(read["mask/coverage"]) == 4
    assert all(0 < value < 1 for value in read["mask/coverage"])
    for total, target, prior in zip(
        read["loss/current"], read["mask/target_loss"], read["mask/prior_loss"], strict=True
    ):
        assert total == pytest.approx(target + prior, rel=1e-5)
    assert read["mask/masked_rate"] == [1.0] * 4
    assert read["mask/prior_factor"] == [0.5] * 4
    assert len(read["mask/error_inside"]) == len(read["mask/error_outside"]) == len(read["mask/drift_outside"]) == 4
    # At the first step the LoRA is 0, and the teacher the student, but for the rounding of bfloat16.
    assert 0 <= read["mask/drift_outside"][0] < 1e-4 * read["mask/error_outside"][0]
    assert len(read["mask/coverage_dataset_0"]) == 1
    pictures = log.Images("mask/first_items")
    assert [picture.step for picture in pictures] == [0, 2]
    (file,) = tmp_path.rglob("lora_first_items.png")
    with Image.open(file) as image:
        assert (pictures[-1].width, pictures[-1].height) == image.size
    assert "not found in the caches" not in run.output


INLINE = {"blissful-tuner": ("BLISSFUL_REPO", ("blissful_on_cpu",)), "musubi-tuner 0.2": ("MUSUBI_02_REPO", ())}


@pytest.mark.parametrize("trainer", INLINE)
@pytest.mark.parametrize("family", CORE)
@pytest.mark.parametrize("way", ["launcher", "network module"])
def test_trainers_whose_loss_is_no_method(laboratory, trainer, family, way):
    """A white mask is the stock run, and masks with a prior, huber and a weighting give the losses of the newer trainer."""
    variable, hooks = INLINE[trainer]
    repo = os.environ.get(variable)
    if not repo:
        pytest.skip(f"needs a checkout of {trainer} in {variable}")
    launcher = way == "launcher"
    on = ["--use_mask_loss"] if launcher else ["--network_module", network_module(family)]
    # WAN of blissful-tuner takes no batch of two without a GPU.
    given = {"steps": 3, "batch_size": 1}
    older = {**given, "hooks": hooks, "MUSUBI_REPO": repo}
    white = laboratory.cache(family, "masks_white")
    stock = laboratory.train(family, white, masks=False, **older)
    masked = laboratory.train(family, white, *on, masks=launcher, **older)
    assert masked.lora == stock.lora
    assert masked.losses == pytest.approx(stock.losses, rel=1e-6)
    assert masked.metadata()["ss_use_mask_loss"] == "True"
    assert "masked_loss_triton" not in masked.metadata()["ss_network_module"]

    if family == "wan" and trainer == "blissful-tuner":
        return  # its model is another one
    options = {"inverted_mask_prior": "true", "loss_type": "huber", "mask_min_weight": "0.1"}
    if launcher:
        flags = [*on, "--inverted_mask_prior", "--loss_type", "huber", "--mask_min_weight", "0.1"]
    else:
        flags = [*on, "--network_args", *(f"{name}={value}" for name, value in options.items())]
    if family != "qwen":
        flags += ["--weighting_scheme", "cosmap"]
    root = laboratory.cache(family, "masks")
    old = laboratory.train(family, root, *flags, masks=launcher, **older)
    newer = laboratory.train(family, root, *flags, masks=launcher, **given)
    assert old.losses == pytest.approx(newer.losses, rel=1e-3)


@pytest.mark.parametrize("flags", [(), ("--mask_min_weight", "0.2")])
@pytest.mark.parametrize("family", CORE)
def test_the_masked_loss_of_the_fork_that_has_one_is_ours(laboratory, family, flags):
    """DustyL's blissful-tuner weights the loss in its training loop, by code of its own, and reads our caches."""
    repo = os.environ.get("BLISSFUL_REPO")
    if not repo or "mask_loss_scale" not in (Path(repo) / "src/musubi_tuner/hv_train_network.py").read_text():
        pytest.skip("needs a checkout of DustyL/blissful-tuner in BLISSFUL_REPO")
    root = laboratory.cache(family, "masks")
    given = {"steps": 3, "batch_size": 1, "hooks": ("blissful_on_cpu",), "MUSUBI_REPO": repo}
    theirs = laboratory.train(family, root, "--use_mask_loss", *flags, masks=False, **given)
    ours = laboratory.train(family, root, "--use_mask_loss", *flags, **given)
    assert "masks are on" in ours.output
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-6)
    difference = max(float((value - theirs.tensors()[name]).abs().max()) for name, value in ours.tensors().items())
    assert difference <= 1e-6
    assert laboratory.train(family, root, masks=False, **given).lora != theirs.lora
