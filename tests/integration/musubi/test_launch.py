"""The command line around the trainer: its own main function, and names that another fork gives the flags."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest

from masked_loss_triton.cli import main
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi import options
from tests.integration.musubi.small_trainer import trained
from tests.support.caches import caches

FORK = {
    "mask_blur_radius": (5, "mask_blur_kernel_size", 5),
    "prior_preservation_weight": (0.7, "inverted_mask_prior_weight", 0.7),
    "prior_preservation_timestep_threshold": (300.0, "prior_timestep_threshold", 300.0),
    "prior_teacher_mode": ("ema", "prior_teacher", "ema"),
    "prior_teacher_ema_decay": (0.9, "prior_ema_decay", 0.9),
    "prior_decay_warmup_ratio": (0.1, "prior_warmup_ratio", 0.1),
}


@pytest.mark.parametrize("way", ["flags", "configuration file", "network_args", "its own parser"])
def test_the_names_of_another_fork_are_taken(way):
    parser = argparse.ArgumentParser()
    if way == "its own parser":
        for name, (value, _, _) in FORK.items():
            parser.add_argument(f"--{name}", type=type(value))
    flags = [word for name, (value, _, _) in FORK.items() for word in (f"--{name}", str(value))]
    args = options.add_arguments(parser).parse_args([] if way == "configuration file" else flags)
    for name, (value, _, _) in FORK.items() if way == "configuration file" else ():
        setattr(args, name, value)
    if way == "network_args":
        arguments = {name: str(value) for name, (value, _, _) in FORK.items()}
        chosen = options.take_from(arguments)
        assert not arguments
    else:
        chosen = options.from_namespace(args)
    assert all(getattr(chosen, ours) == value for _, ours, value in FORK.values())
    assert chosen.inverted_mask_prior
    with pytest.raises(
        UserError, match=r"--prior_teacher_mode ema is --prior_teacher, which is base|--mask_blur_radius 5"
    ):
        options.from_namespace(argparse.Namespace(mask_blur_radius=5, mask_blur_kernel_size=3))


def test_what_the_fork_knows_and_we_do_not_need_is_said(tmp_path, capsys):
    lab = caches(tmp_path, "wan", stems="ab")
    trained("method", lab, "--use_mask_loss", max_train_steps=1, mask_loss_scale=1.0, prior_teacher_eval=False)
    assert "mask_loss_scale" not in capsys.readouterr().out
    trained("method", lab, "--use_mask_loss", max_train_steps=1, mask_loss_scale=2.0, prior_teacher_eval=True)
    out = capsys.readouterr().out
    assert "--mask_loss_scale does nothing: every weight times one number is divided out again" in out
    assert "--prior_teacher_eval does nothing: the teacher runs in the model's own mode" in out
    assert "is no flag" not in out


def test_masks_are_not_switched_on_twice(tmp_path):
    lab = caches(tmp_path, "wan", stems="ab")
    module = "masked_loss_triton.integration.musubi.lora_wan"
    with pytest.raises(UserError, match="masks are switched on twice, by --use_mask_loss and by --network_module"):
        trained("method", lab, "--use_mask_loss", network_module=module)


def test_the_command_line(capsys, tmp_path):
    assert main(["train", "hv_train", "--use_mask_loss"]) == 2
    assert "trains the whole model in a loop of its own" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "name the model family, one of hv, hv15, wan" in capsys.readouterr().err
    assert main(["train", "sdxl"]) == 2
    assert "'sdxl' is no model family: give one of hv, hv15, wan" in capsys.readouterr().err
    assert main(["train", "--musubi", str(tmp_path), "wan"]) == 2
    assert f"--musubi {tmp_path}: no musubi_tuner in it" in capsys.readouterr().err
    assert main(["train", "wan", "--musubi", str(tmp_path)]) == 2
    assert f"--musubi {tmp_path}: no musubi_tuner in it" in capsys.readouterr().err


FAKE = """
import argparse, json
from pathlib import Path
from tests.integration.musubi.small_trainer import MethodTrainer, arguments

class WanNetworkTrainer(MethodTrainer):
    pass

def setup_parser_common():
    return argparse.ArgumentParser(allow_abbrev=False)

def main():
    parser = setup_parser_common()
    parser.add_argument("--dataset_config")
    parser.add_argument("--cache")
    parser.add_argument("--fail", action="store_true")
    args = parser.parse_args()
    if args.fail:
        raise RuntimeError("inside the trainer")
    trainer = WanNetworkTrainer("wan", Path(args.cache))
    fixed = arguments(args.dataset_config, max_train_steps=2)
    for name, value in vars(args).items():
        setattr(fixed, name, value)
    trainer.train(fixed)
    print(json.dumps([type(trainer).__name__, trainer.losses]))
"""


def test_the_launcher_starts_a_checkouts_own_main(tmp_path):
    """Through the shell, in a process of its own: the package's name, its module and its main are where the real ones are."""
    lab = caches(tmp_path / "data", "wan", stems="ab")
    package = tmp_path / "checkout" / "src" / "musubi_tuner"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "wan_train_network.py").write_text(FAKE)

    def run(*arguments):
        command = [
            sys.executable,
            "-m",
            "masked_loss_triton.integration.musubi",
            "wan",
            "--musubi",
            tmp_path / "checkout",
        ]
        command += ["--dataset_config", lab.toml, "--cache", lab.cache, *arguments]
        environment = {**os.environ, "PYTHONPATH": "examples:."}
        return subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment, timeout=120, check=False
        )

    done = run("--use_mask_loss", "--mask_gamma", "0.5")
    assert done.returncode == 0, done.stderr
    name, losses = json.loads(done.stdout.splitlines()[-1])
    assert name == "MaskedWanNetworkTrainer"
    assert losses == trained("method", lab, "--use_mask_loss", "--mask_gamma", 0.5, max_train_steps=2).losses
    assert "--prior_ema_decay" in run("--help").stdout
    failed = run("--fail")
    assert failed.returncode == 1
    assert "RuntimeError: inside the trainer" in failed.stderr
    wrong = run("--use_mask_loss", "--mask_gamma", "0")
    assert wrong.returncode == 2
    assert wrong.stderr == "masked-loss train: --mask_gamma must be > 0, got 0.0\n"
