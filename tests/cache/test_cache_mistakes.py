"""masked-loss cache on odd names and caches, and what it says to the wrong command."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from masked_loss_triton.cli import main
from tests.cache.support import disc, expected, read, weights


def test_a_cache_that_was_cut_short_is_named_and_the_rest_is_done(lab, capsys):
    for stem in "abc":
        lab.picture(stem, mask=disc((160, 120)))
        lab.add_cache(stem)
    cut = lab.cache / "b_0160x0120_wan.safetensors"
    data = cut.read_bytes()[:-100]
    cut.write_bytes(data)
    assert lab.run("cache", "--masks", lab.masks) == 1
    captured = capsys.readouterr()
    assert captured.err.count(str(cut)) == 1
    assert "2 masks written, 1 problems" in captured.out
    assert cut.read_bytes() == data


def test_the_family_is_that_of_the_caches(lab, capsys):
    from masked_loss_triton.cli import main

    lab.picture("a", mask=disc((160, 120)))
    flags = ["--dataset_config", str(lab.toml), "--masks", str(lab.masks)]
    assert main(["cache", *flags]) == 2
    assert "no latent caches to see it from: name the model family, --arch hv|" in capsys.readouterr().err
    path = lab.add_cache("a")
    assert main(["cache", *flags, "--arch", "hv"]) == 1
    assert "no hv latent caches in" in (said := capsys.readouterr().err)
    assert "but 1 of wan: give the family of these caches with --arch" in said
    for command in (["cache"], ["check"], ["inspect", "--output", str(lab.folder / "sheet")]):
        assert main([*command, *flags]) == 0
    assert weights(path).shape == (1, 14, 18)
    path.with_name("b_0160x0120_new1.safetensors").touch()
    assert main(["cache", *flags]) == 0, "a trainer may have families that are not known here"
    path.with_name("b_0160x0120_qi.safetensors").touch()
    assert main(["cache", *flags]) == 2
    assert "there are caches of qwen, wan: name the model family" in capsys.readouterr().err


def test_an_orphaned_cache_gets_its_mask_by_stem(lab):
    Image.fromarray(disc((160, 120))).save(lab.masks / "gone.png")
    path = lab.add_cache("gone")
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert torch.equal(weights(path)[0], expected(disc((160, 120))))


@pytest.mark.skipif(os.name == "nt", reason="file names are text there")
def test_a_file_name_that_is_no_text(lab, capsys):
    lab.write_toml(general='mask_time = "mean"')
    stem = os.fsdecode(b"caf\xe9")
    for name in (stem, stem + "2"):
        lab.picture(name, mask=disc((160, 120)) if name == stem else None)
    # The safetensors library refuses such a name, so the caches have another while it writes and reads them.
    plain = lab.add_cache("plain")
    odd = [lab.cache / f"{name}_0160x0120_wan.safetensors" for name in (stem, stem + "2")]
    shutil.copy(plain, odd[1])
    plain.rename(odd[0])
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert "caf\\udce92" in capsys.readouterr().out
    os.link(odd[0], plain)
    assert read(plain)[1]["mask_file"] == "caf\\udce9.png"
    plain.unlink()
    assert lab.run("check", "--masks", lab.masks) == 1
    assert lab.run("inspect", "--masks", lab.masks, "--output", lab.folder / "sheet") == 0


@pytest.mark.parametrize("command", ["cache", "check", "inspect", "to-alpha"])
def test_help_has_an_example_and_loads_nothing_heavy(command, capsys):
    from masked_loss_triton.cli import main

    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"Example:\n  masked-loss {command} " in capsys.readouterr().out
    code = "import sys; from masked_loss_triton.cli import build_parser; build_parser(); "
    code += "print(sorted({'cv2', 'av', 'PIL', 'tomllib'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found == "[]\n"


def test_usage_errors(lab, capsys):
    lab.picture("a")
    for flags, line in (
        ((), "nothing says where the masks are"),
        (("--masks", lab.folder / "no"), "cannot be read"),
        (("--masks", lab.images), "itself, so that pictures would be masks"),
        (("--alpha_mask", "--mask_blur", "0.5"), "mask_blur must be a number between 0 and 0.05"),
        (("--alpha_mask", "--remove", "--encode"), "--encode"),
    ):
        assert lab.run("cache", *flags) == 2
        captured = capsys.readouterr()
        assert line in captured.err
        assert captured.err.count("\n") == 1
    assert lab.run("cache", "--alpha_mask") == 1
    assert "run the trainer's caching script first" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("musubi_tuner") is not None, reason="the trainer is installed here")
def test_without_the_trainer_encoding_says_what_is_missing(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    toml = tmp_path / "d.toml"
    toml.write_text(f'[[datasets]]\nimage_directory = "{tmp_path}/images"\nresolution = [64, 64]\nalpha_mask = true\n')
    assert main(["cache", "--dataset_config", str(toml), "--arch", "wan", "--encode", "--vae", "x"]) == 2
    assert "musubi_tuner is not installed here" in capsys.readouterr().err
