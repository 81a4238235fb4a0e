"""The table of model families is the one place: what is entered there, every command knows."""

from __future__ import annotations

import dataclasses

import pytest

from masked_loss_triton.cache.families import FAMILIES, Family, family_of, trained
from masked_loss_triton.cli import main
from tests.cache.support import Lab, disc, weights


def test_short_names_belong_to_one_family():
    suffixes = [suffix for family in FAMILIES.values() for suffix in family.suffixes]
    assert len(set(suffixes)) == len(suffixes)
    assert all(family_of(suffix) in FAMILIES for suffix in suffixes)
    assert family_of("none") is None


def test_a_family_that_is_trained_names_its_script_class_and_network():
    for name in trained():
        assert FAMILIES[name].trainers
        assert FAMILIES[name].network
    assert "hv15" not in trained()


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
        monkeypatch.setitem(FAMILIES, "new", dataclasses.replace(new, training_script=None))
        assert main(["train", "new", "--dataset_config", "d.toml"]) == 2
        assert "can be masked in its caches and not trained yet" in capsys.readouterr().err
        return
    lab = Lab(tmp_path, "new")
    lab.picture("a", mask=disc((160, 120)))
    path = lab.add_cache("a")
    assert lab.run("cache", "--mask_directory", lab.masks) == 0
    assert weights(path).shape == (1, 14, 18)
    flags = ("--out", tmp_path / "sheet") if command == "inspect" else ()
    assert lab.run(command, "--mask_directory", lab.masks, *flags) == 0
