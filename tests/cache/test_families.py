"""The table of model families is the one place: what is entered there, every command knows."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from masked_loss_triton.cache.families import FAMILIES, REFUSED, Family, family_of, named
from masked_loss_triton.cli import main
from masked_loss_triton.errors import UserError
from tests.cache.support import Lab, disc, frames_of, video_lab, weights


def test_short_names_belong_to_one_family():
    suffixes = [suffix for family in FAMILIES.values() for suffix in family.suffixes]
    assert len(set(suffixes)) == len(suffixes)
    assert all(family_of(suffix) in FAMILIES for suffix in suffixes)
    assert family_of("none") is None


def test_every_family_names_its_scripts_class_and_network():
    for family in FAMILIES.values():
        assert all((family.caching_script, family.training_script, family.trainers, family.network))
        assert family.training_script not in REFUSED


def test_a_family_is_found_by_every_name_it_has():
    for name, family in FAMILIES.items():
        for word in (name, *family.suffixes, family.training_script, f"src/{family.training_script}.py"):
            assert named(word) == name
    with pytest.raises(
        UserError, match=r"'flux' is no model family \(did you mean flux2\?\): give one of hv, hv15, wan"
    ):
        named("flux")
    for script, reason in REFUSED.items():
        with pytest.raises(UserError, match=f"{script} {reason}"):
            named(f"{script}.py")


@pytest.mark.parametrize("command", ["cache", "check", "inspect", "train"])
def test_one_entry_is_enough(tmp_path, monkeypatch, capsys, command):
    new = Family(
        suffixes=("new",),
        fps=24.0,
        caching_script="new_cache_latents",
        training_script="new_train_network",
        trainers=("NewNetworkTrainer",),
        network="lora_new",
    )
    monkeypatch.setitem(FAMILIES, "new", new)
    if command == "train":
        assert main(["train", "new", "--musubi", str(tmp_path), "--dataset_config", "d.toml"]) == 2
        assert "no musubi_tuner in it" in capsys.readouterr().err, "it looks for the trainer"
        return
    lab = Lab(tmp_path, "new")
    lab.picture("a", mask=disc((160, 120)))
    path = lab.add_cache("a")
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert weights(path).shape == (1, 14, 18)
    flags = ("--output", tmp_path / "sheet") if command == "inspect" else ()
    assert lab.run(command, "--masks", lab.masks, *flags) == 0


# Pixels of a latent cell, where that is not 8; trainers write it nowhere, the caches' sizes say it.
CELLS = {"flux2": 16, "ideogram4": 16, "hidream": 32}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_of_every_family_takes_the_same_mask(tmp_path, capsys, family):
    """Kontext has no F in the tensor, FLUX.2 none in the name either, HiDream-O1 patches of pixels with the channels last."""
    cell = CELLS.get(family, 8)
    labs = [Lab(tmp_path / name, FAMILIES[name].suffixes[0], (160, 96)) for name in (family, "wan")]
    for lab in labs:
        lab.picture("a", (160, 96), mask=disc((160, 96)))
    path, wan = (lab.add_cache("a", (160, 96), cell=cell) for lab in labs)
    for lab in labs:
        assert lab.run("cache", "--masks", lab.masks) == 0
    assert weights(path).shape == (1, 96 // cell, 160 // cell)
    assert torch.equal(weights(path), weights(wan))
    lab = labs[0]
    assert lab.run("check", "--masks", lab.masks) == 0
    assert lab.run("inspect", "--masks", lab.masks, "--output", tmp_path / "sheet") == 0
    assert main(["inspect", "--cache", str(path), "--output", str(tmp_path / "bare")]) == 0
    tensors = {f"latents_1x3x{160 // cell}_bfloat16": torch.zeros(16, 4, 160 // cell).bfloat16()}
    save_file(tensors, path)
    capsys.readouterr()
    assert lab.run("cache", "--masks", lab.masks) == 1
    assert "the shape of its latents is not the one in their name" in capsys.readouterr().err


def test_a_section_of_a_clip_gets_the_frames_of_the_section(tmp_path, capsys):
    """FramePack: latent frame 0 starts every section; section s of F latent frames has 1 + s F to (s + 1) F."""
    lab = video_lab(tmp_path, frames_of(17))
    os.link(lab.images / "clip.mp4", lab.masks / "clip.mp4")
    whole = lab.add_cache("clip_00000-017", (128, 128), frames=5)
    flags = ("--masks", lab.masks, "--dtype", "float32")
    assert lab.run("cache", *flags) == 0
    lab.suffix = "fp"
    sections = [lab.add_cache(f"clip_00000-017-{number:04d}", (128, 128), frames=2) for number in range(2)]
    assert lab.run("cache", *flags) == 0
    assert torch.equal(torch.cat([weights(path) for path in sections]), weights(whole)[1:])
    assert lab.run("check", *flags[:2]) == 0
    assert lab.run("inspect", *flags[:2], "--output", tmp_path / "sheet") == 0
    lab.add_cache("clip_00000-017-0002", (128, 128), frames=2)
    capsys.readouterr()
    assert lab.run("cache", *flags) == 1
    assert "section 2 of 2 latent frames ends at frame 25, and its window has 17" in capsys.readouterr().err
