"""Flags, their faults, what is checked before anything is loaded, and the command line around it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from masked_loss_triton.config import LOSS_TYPES
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi import options
from masked_loss_triton.integration.musubi.caches import inspect_caches
from masked_loss_triton.integration.musubi.options import MaskOptions
from masked_loss_triton.integration.musubi.trainer import has_loss_seam, masked_class
from tests.integration.musubi import small_trainer
from tests.integration.musubi.small_trainer import GENERATIONS, InlineTrainer, MethodTrainer, trained
from tests.support.caches import caches

BAD = [
    ("mask_weights", "face", "must be LABEL=WEIGHT with weights >= 0"),
    ("mask_gamma", 0.0, "must be > 0, got 0.0"),
    ("mask_min_weight", 1.0, "must be in [0, 1), got 1.0"),
    ("mask_blur_kernel_size", 4, "must be 0 (off) or an odd integer"),
    ("mask_normalization", "sum", "must be one of weighted_mean, mean_one, mean"),
    ("mask_area_scale_beta", -1.0, "must be >= 0"),
    ("mask_probability", 1.5, "must be in [0, 1], got 1.5"),
    ("mask_probability", float("nan"), "must be in [0, 1], got nan"),
    ("loss_type", "l2", f"must be one of {', '.join(LOSS_TYPES)}"),
    ("loss_delta", 0.0, "must be > 0"),
    ("inverted_mask_prior_weight", -0.5, "must be >= 0"),
    ("prior_mask_threshold", 2.0, "must be in [0, 1]"),
    ("prior_teacher", "best", "must be one of base, ema"),
    ("prior_ema_decay", 1.0, "must be in [0, 1)"),
    ("prior_timestep_threshold", 1200.0, "must be in [0, 1000]"),
    ("prior_decay_schedule", "step", "must be one of constant, linear, cosine"),
    ("prior_decay_timestep_start", 0.0, "must be in [0.001, 1000]"),
    ("prior_warmup_ratio", -0.1, "must be in [0, 1]"),
    ("prior_probability", 0.0, "must be in (0, 1], got 0.0"),
    ("mask_normalize_across", "all", "must be one of rank, world, accumulation"),
    ("mask_given_frames", "drop", "must be one of keep, ignore"),
    ("mask_routing", 0.0, "must be in (0, 1], got 0.0"),
    ("mask_routing_until", 1.5, "must be in (0, 1]"),
    ("mask_routing_background", 1.0, "must be in [0, 1)"),
    ("mask_routing_grow", -1, "must be >= 0"),
    ("mask_routing_blocks", "3", "must be FIRST-LAST, as 2-37"),
    ("mask_routing_blocks", "5-3", "must be FIRST-LAST"),
    ("mask_gamma", "0.5", "must be a number, got '0.5'"),  # from a configuration file
    ("invert_mask", "yes", "must be true or false"),
    ("mask_blur_kernel_size", 3.0, "must be a whole number"),
    ("mask_gamma", True, "must be a number"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_bad_value_is_one_line_that_names_the_flag(name, value, message):
    with pytest.raises(UserError) as error:
        MaskOptions(**{name: value})
    text = str(error.value)
    assert text.startswith(f"--{name} ")
    assert message in text
    assert "\n" not in text
    assert error.value.exit_status == 2


def test_every_flag_has_a_bad_value_or_is_a_switch():
    covered = {name for name, _, _ in BAD}
    switches = {field.name for field in dataclasses.fields(MaskOptions) if field.metadata["kind"] is bool}
    assert covered | switches == {field.name for field in dataclasses.fields(MaskOptions)}


def prior(**more):
    return {"use_mask_loss": True, "inverted_mask_prior": True, **more}


def test_combinations_that_cannot_be():
    with pytest.raises(UserError, match="add --normalize_per_sample, or use constant"):
        MaskOptions(**prior(prior_decay_schedule="linear"))
    MaskOptions(**prior(prior_decay_schedule="linear", normalize_per_sample=True))
    with pytest.raises(UserError, match="cannot keep two denominators"):
        MaskOptions(**prior(mask_normalize_across="accumulation"))
    MaskOptions(**prior(mask_normalize_across="accumulation", normalize_per_sample=True))
    MaskOptions(**prior(mask_normalize_across="accumulation", mask_normalization="mean"))
    with pytest.raises(UserError, match="the area of one micro-batch"):
        MaskOptions(mask_normalize_across="accumulation", mask_area_scale_beta=0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mask_gamma": 0.5}, "--mask_gamma does nothing without --use_mask_loss"),
        (prior(inverted_mask_prior_weight=0.0), "does nothing with --inverted_mask_prior_weight 0"),
        ({"use_mask_loss": True, "prior_teacher": "ema"}, "--prior_teacher does nothing without --inverted_mask_prior"),
        (prior(prior_ema_decay=0.9), "--prior_ema_decay does nothing without --prior_teacher ema"),
        (prior(prior_decay_timestep_start=100.0), "--prior_decay_timestep_start does nothing"),
        ({"use_mask_loss": True, "loss_delta": 2.0}, "--loss_delta does nothing with --loss_type mse"),
        ({"use_mask_loss": True, "mask_probability": 0.0}, "--mask_probability 0 masks no batch"),
        ({"use_mask_loss": True, "mask_normalize_across": "world"}, "does nothing with one process"),
        ({"use_mask_loss": True, "mask_normalize_across": "accumulation"}, "--gradient_accumulation_steps 1"),
    ],
)
def test_what_does_nothing_is_said(given, said):
    (note,) = MaskOptions(**given).idle(1, 1)
    assert said in note
    assert MaskOptions(use_mask_loss=True).idle(1, 1) == []
    assert MaskOptions().idle(1, 1) == []
    assert MaskOptions(use_mask_loss=True, mask_normalize_across="world").idle(2, 1) == []
    assert MaskOptions(use_mask_loss=True, loss_type="pseudo_huber", loss_delta=2.0).idle(1, 1) == []


def test_flags_join_the_trainers_parser_and_its_own_stay():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mask_min_weight", type=float, default=0.25, help="the trainer's own")
    options.add_arguments(parser)
    args = parser.parse_args(["--use_mask_loss", "--mask_gamma", "0.5", "--loss_type", "huber"])
    chosen = options.from_namespace(args)
    assert (chosen.mask_gamma, chosen.mask_min_weight, chosen.loss_type) == (0.5, 0.25, "huber")
    assert options.from_namespace(argparse.Namespace()) == MaskOptions()
    assert "the trainer's own" in parser.format_help()
    # The trainer's --config_file puts what it reads into the namespace, and parses again.
    again = parser.parse_args([], namespace=argparse.Namespace(use_mask_loss=True, mask_gamma=2))
    assert options.from_namespace(again).mask_gamma == 2


def test_network_arguments_are_text():
    given = {"conv_dim": "4", "mask_gamma": "0.5", "inverted_mask_prior": "True", "mask_blur_kernel_size": "3"}
    chosen = options.take_from(given)
    assert given == {"conv_dim": "4"}
    assert chosen == MaskOptions(use_mask_loss=True, mask_gamma=0.5, inverted_mask_prior=True, mask_blur_kernel_size=3)
    for text, message in (("mask_gamma=big", "must be a number"), ("invert_mask=ja", "must be true or false")):
        with pytest.raises(UserError, match=f"--network_args {text}: {message}"):
            options.take_from(dict([text.split("=")]))
    with pytest.raises(
        UserError, match=r"--network_args mask_gama=2: there is no such option: did you mean mask_gamma\?"
    ):
        options.take_from({"mask_gama": "2"})


@pytest.mark.parametrize("module", ["musubi.lora", "musubi.lora_wan", "musubi.lora_hv", "musubi.lora_qwen"])
def test_the_network_module_switches_its_trainer_on(module, tmp_path, monkeypatch):
    """The trainer's package is not here: modules under its names hold a LoRA of the small trainer."""
    lab = caches(tmp_path, "wan", stems="abce")
    name = {"musubi.lora_hv": "lora", "musubi.lora_qwen": "lora_qwen_image"}.get(module, "lora_wan")
    real = types.ModuleType(f"musubi_tuner.networks.{name}")
    seen = {}

    def create(*given, **named):
        seen.update(named)
        return "network"

    real.create_arch_network = real.create_arch_network_from_weights = create
    for path in ("musubi_tuner", "musubi_tuner.networks"):
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    monkeypatch.setitem(sys.modules, real.__name__, real)
    monkeypatch.delitem(sys.modules, f"masked_loss_triton.integration.{module}", raising=False)
    ours = importlib.import_module(f"masked_loss_triton.integration.{module}")

    class Trainer(MethodTrainer):
        def build(self, args):
            arguments = dict(argument.split("=") for argument in args.network_args)
            return ours.create_arch_network(1.0, 4, **arguments)

    trainer = Trainer("wan", lab.cache)
    args = small_trainer.arguments(lab.toml, network_args=["mask_gamma=0.5", "conv_dim=4"])
    args.network_module = f"masked_loss_triton.integration.{module}"
    assert trainer.build(args) == "network"
    assert seen == {"conv_dim": "4"}
    assert type(trainer).__name__ == "MaskedTrainer"
    assert trainer.masked.options.mask_gamma == 0.5
    assert args.network_module == f"networks.{name}"
    merged = Trainer("wan", lab.cache)
    merged.merge = types.MethodType(
        lambda self, args: ours.create_arch_network_from_weights(1.0, {}, for_inference=True), merged
    )
    assert merged.merge(args) == "network"
    assert type(merged) is Trainer  # weights that are merged into the model train nothing
    with pytest.raises(UserError, match="no trainer is building it"):
        ours.create_arch_network(1.0, 4)


def test_unknown_seams_are_refused():
    assert has_loss_seam(MethodTrainer)
    assert not has_loss_seam(InlineTrainer)

    class Renamed(MethodTrainer):
        def call_dit(
            self, args, accelerator, model, latents, batch, noise, noisy_model_input, timesteps, network_dtype
        ):
            raise AssertionError

    class Longer(MethodTrainer):
        def compute_loss(self, args, output, timesteps, noise_scheduler, dit_dtype, network_dtype, mask):
            raise AssertionError

    for cls, name in ((Renamed, "Renamed.call_dit takes"), (Longer, "Longer.compute_loss takes")):
        with pytest.raises(UserError, match=name) as error:
            masked_class(cls)
        assert "supported are musubi-tuner 0.2.14 to 0.3.4, blissful-tuner" in str(error.value)
    with pytest.raises(UserError, match="call_dit is missing"):
        has_loss_seam(type("Nothing", (), {}))


def test_caches_are_inspected_before_training(tmp_path, capsys):
    lab = caches(tmp_path, "wan", "none")
    with pytest.raises(UserError) as error:
        trained("method", lab, "--use_mask_loss")
    assert f"4 of 4 latent caches have no mask, the first is {lab.cache}/a_" in str(error.value)
    assert f"masked-loss cache --dataset_config {lab.toml} --arch wan" in str(error.value)
    first = sorted(lab.cache.glob("*_wan.safetensors"))[0]
    for stem in ("a", "b", "c"):
        (lab.masks / f"{stem}.png").unlink(missing_ok=True)
    assert lab.run("cache", "--masks", lab.masks, "--mask_bake_gamma", "0.5") == 0
    report = inspect_caches(str(lab.toml), "wan")
    name = f"dataset 0 ({lab.images})"
    assert report.summary() == [
        f"{name}: masks in 4 caches, from: no mask and full weight 4; coverage 100.0%",
        "baked into the caches: mask_bake_gamma 0.5",
    ]
    twice = report.warnings(MaskOptions(use_mask_loss=True, mask_gamma=2.0, invert_mask=True))
    assert "--mask_gamma 2.0 comes on top of mask_bake_gamma 0.5" in twice[0]
    assert "4 caches have no mask but full weight" in twice[1]
    assert report.warnings(MaskOptions(use_mask_loss=True, mask_min_weight=0.1)) == []

    tensors = load_file(first)
    (key,) = [name for name in tensors if name.startswith("mask_weights")]
    save_file({**tensors, key: torch.ones(1, 1, 4, 4)}, first)
    with pytest.raises(UserError, match="does not fit its latents"):
        inspect_caches(str(lab.toml), "wan")
    save_file({name: value for name, value in tensors.items() if name != key}, first)
    with pytest.raises(UserError, match="1 of 4 latent caches have no mask"):
        inspect_caches(str(lab.toml), "wan")
    first.write_bytes(first.read_bytes()[:200])
    with pytest.raises(UserError, match=f"{first.name} is cut short or damaged"):
        inspect_caches(str(lab.toml), "wan")
    for path in lab.cache.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no wan latent caches"):
        inspect_caches(str(lab.toml), "wan")
    capsys.readouterr()


def test_masks_that_another_program_wrote_are_taken(tmp_path):
    lab = caches(tmp_path, "hv", "none", "a")
    (path,) = lab.cache.glob("*_hv.safetensors")
    tensors = load_file(path)
    (shape,) = [value.shape[1:] for name, value in tensors.items() if name.startswith("latents_")]
    save_file({**tensors, f"mask_weights_{'x'.join(map(str, shape))}_float32": torch.ones(1, *shape)}, path)
    (line,) = inspect_caches(str(lab.toml), "hv").summary()
    assert line.endswith("masks in 1 caches, from: another program 1; coverage 100.0%")


def test_the_banner(tmp_path, capsys, monkeypatch):
    lab = caches(tmp_path, "wan", stems="abce")
    trained("method", lab, "--use_mask_loss", "--mask_gamma", 0.5, "--loss_delta", 2, max_train_steps=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4] == "masked-loss: masks are on: mask_gamma=0.5, loss_delta=2.0"
    assert lines[-3].startswith(f"masked-loss: dataset 0 ({lab.images}): masks in 4 caches, from: file 4; coverage 2")
    assert lines[-2] == "masked-loss: --loss_delta does nothing with --loss_type mse"
    assert lines[-1].startswith("masked-loss: the first 2 items and the weights that reach the loss: ")
    trained("method", lab, "--use_mask_loss", max_train_steps=1, mask_gama=0.5)
    assert "masked-loss: mask_gama in the configuration file is no flag, and does nothing" in capsys.readouterr().out
    trained("inline", lab, max_train_steps=1)
    assert capsys.readouterr().out.splitlines()[-1] == "masked-loss: masks are not used: --use_mask_loss is not given"
    monkeypatch.setenv("RANK", "1")
    trained("method", lab, max_train_steps=1)
    assert capsys.readouterr().out == ""


def test_the_trainers_own_masked_loss_is_switched_off(tmp_path):
    lab = caches(tmp_path, "wan", stems="abce")
    for generation in GENERATIONS.values():
        parser = argparse.ArgumentParser()
        parser.add_argument("--use_mask_loss", action="store_true")
        args = small_trainer.arguments(lab.toml, "--use_mask_loss", parser=parser, max_train_steps=1)
        trainer = masked_class(generation)("wan", lab.cache)
        trainer.train(args)
        assert args.use_mask_loss is False
        assert trainer.masked is not None
