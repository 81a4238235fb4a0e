"""Whoever else writes in a cache folder: every other tensor keeps its bytes, every file loads, exit statuses are true."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from masked_loss_triton.cache.inject import own_weights, verify_tensors
from masked_loss_triton.cache.safetensors_file import read_header, rewrite
from masked_loss_triton.errors import UserError
from masked_loss_triton.files import atomic
from tests.cache.nursery import Nursery, latents_of
from tests.cache.support import Lab, disc, read
from tests.files.support import namespaces


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


@pytest.mark.skipif(sys.platform != "linux", reason="two files are swapped in one step there alone")
@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_a_cache_that_is_written_at_the_very_last_moment_is_not_lost(tmp_path, monkeypatch, how):
    """After the last look at the old file, before the new one has its name: the trainer's own file comes back."""
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    save_file({"latents": torch.randn(64, 64)}, path)
    save_file({"latents": torch.randn(64, 64)}, other)
    new, exchange, late = other.read_bytes(), atomic._exchange, []

    def trainer(first, second):
        if not late:
            late.append(how)
            if how == "replaced":
                os.replace(other, path)
            else:
                path.write_bytes(new)
        return exchange(first, second)

    monkeypatch.setattr(atomic, "_exchange", trainer)
    with pytest.raises(UserError, match="was written by another program meanwhile"):
        rewrite(read_header(path), add={"m": np.ones(3, np.float16)})
    assert late == [how]
    assert path.read_bytes() == new
    assert not any(name.endswith("masktmp") for name in os.listdir(tmp_path))


def test_where_files_cannot_be_swapped_the_new_one_is_moved(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_file({"latents": torch.randn(64, 64)}, path)
    monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    rewrite(read_header(path), add={"m": np.ones(3, np.float16)})
    assert set(load_file(path)) == {"latents", "m"}
    assert os.listdir(tmp_path) == [path.name]


def flip_a_bit(path, name):
    file = read_header(path)
    with open(path, "r+b") as target:
        target.seek(file.data_start + file.tensors[name]["data_offsets"][0] + 5)
        byte = target.read(1)[0]
        target.seek(-1, os.SEEK_CUR)
        target.write(bytes([byte ^ 1]))


def test_damage_of_the_latents_is_seen_by_check_and_not_masked_over(tmp_path, capsys):
    lab = Lab(tmp_path)
    for stem in "ab":
        lab.picture(stem, mask=disc((160, 120)))
    path, other = lab.add_cache("a"), lab.add_cache("b")
    masks = ("--masks", lab.masks)
    assert verify_tensors(read_header(path)) is None, "it has not been masked yet"
    assert lab.run("cache", *masks) == 0
    assert verify_tensors(read_header(path)) is True
    assert lab.run("check", *masks) == 0
    (latents,) = (name for name in read_header(path).tensors if name.startswith("latents"))
    flip_a_bit(path, latents)
    assert verify_tensors(read_header(path)) is False
    capsys.readouterr()
    assert lab.run("check", *masks, "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)
    assert (problem["kind"], problem["file"]) == ("damaged", str(path))
    assert lab.run("check", *masks, "--ignore", "damaged") == 0
    damaged = path.read_bytes()
    capsys.readouterr()
    assert lab.run("cache", *masks, "--mask_dilate", "3") == 1
    assert f"{path} is damaged: its tensors are not those that were masked" in capsys.readouterr().err
    assert path.read_bytes() == damaged
    assert json.loads(read_header(other).metadata["mask_operations"])["mask_dilate"] == 3, "the rest is done"
    assert lab.run("cache", "--remove") == 0
    assert lab.run("cache", *masks) == 0
    assert lab.run("check", *masks) == 0


def test_weights_that_are_no_weights_are_made_anew(tmp_path, capsys):
    lab = Lab(tmp_path)
    lab.picture("a", mask=disc((160, 120)))
    path, masks = lab.add_cache("a"), ("--masks", lab.masks)
    assert lab.run("cache", *masks) == 0
    good = path.read_bytes()
    file = read_header(path)
    (name,) = own_weights(file)
    for value in (np.nan, np.inf, -0.5, 2.0):
        bad = np.array(read_header(path).read(name))
        bad.flat[3] = value
        rewrite(read_header(path), add={name: bad})
        assert path.read_bytes() != good
        assert lab.run("cache", *masks) == 0
        assert "1 masks written" in capsys.readouterr().out
        assert path.read_bytes() == good


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64, torch.float32])
def test_weights_and_metadata_of_another_program_stay(tmp_path, capsys, dtype):
    """In every command one line, or nothing: no traceback, and no change without --force."""
    lab = Lab(tmp_path)
    lab.picture("a", mask=disc((160, 120)))
    lab.picture("b", mask=disc((160, 120)))
    other = lab.add_cache("b")
    path, masks = lab.add_cache("a"), ("--masks", lab.masks)
    tensors, metadata = read(path)
    foreign = f"mask_weights_1x14x18_{str(dtype).removeprefix('torch.')}"
    tensors = {**tensors, foreign: torch.ones(1, 1, 14, 18, dtype=dtype)}
    save_file(tensors, path, metadata={**metadata, "mask_author": "somebody", "mask_source": "theirs"})
    before = path.read_bytes()
    assert lab.run("cache", *masks) == 1
    said = capsys.readouterr().err
    assert f"{path} has mask weights of another program ({foreign}): --force replaces them" in said
    assert lab.run("cache", "--remove", "--dry_run") == 0
    assert lab.run("cache", "--remove") == 0
    assert path.read_bytes() == before
    assert not own_weights(read_header(other))
    assert lab.run("check", *masks) == 1
    assert lab.run("inspect", *masks, "--output", tmp_path / "sheet") in (0, 1)
    assert "Traceback" not in capsys.readouterr().err
    assert lab.run("cache", *masks, "--force") == 0
    tensors, metadata = read(path)
    assert sum(name.startswith("mask_weights_") for name in tensors) == 1
    assert lab.run("cache", "--remove") == 0
    assert read(path)[1]["mask_author"] == "somebody"
    assert "mask_source" not in read(path)[1]


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
        subprocess.Popen([*command, "--masks", str(lab.masks), *option], stderr=subprocess.PIPE, text=True)
        for option in options
    ]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert "Traceback" not in "".join(said)
    for path, tensors in before.items():
        loaded = load_file(path)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert sorted(os.listdir(lab.cache)) == sorted(path.name for path in before)


ROUNDS, PICTURES = int(os.environ.get("ROUNDS", "12")), 6
# What the rounds are to show. Which of it comes first depends on the machine: they go on until all was seen.
TO_SEE = ("waited", "killed", "cache", "remove", "encode", "generate", "trainer")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("place", ["one namespace", "two namespaces"])
def test_commands_and_kills_in_any_order(tmp_path, place):
    """Three commands at a time, a third of them killed: the latents stay those of the trainer's last run, and all is told."""
    if place == "two namespaces" and namespaces("--pid", "--fork", "--mount-proc") is None:
        pytest.skip("this machine gives no namespaces of process numbers")
    lab = Lab(tmp_path)
    config = {"general": {"caption_extension": ".txt", "enable_bucket": True}, "datasets": [{"resolution": [128, 128]}]}
    config["datasets"][0].update(image_directory=str(lab.images), cache_directory=str(lab.cache))
    (tmp_path / "dataset.json").write_text(json.dumps(config))
    for i in range(PICTURES):
        lab.picture(f"p{i}", mask=disc((160, 120), (i / PICTURES, 0.5)) if i % 2 else None)
    nurseries = [Nursery([])]
    if place == "two namespaces":
        nurseries.append(Nursery(namespaces("--pid", "--fork", "--mount-proc") or []))
    draw = random.Random(f"5 {place}")
    seen: Counter[str] = Counter()
    versions, caches = {0}, {}
    try:
        trainer = nurseries[0].ask(
            run=["trainer", "--dataset_config", str(tmp_path / "dataset.json"), "--version", "0"], log="/dev/null"
        )
        assert nurseries[0].ask(wait=trainer) == 0
        caches = {f"p{i}": lab.cache / f"p{i}_0160x0120_wan.safetensors" for i in range(PICTURES)}
        for number in range(1, 10 * ROUNDS + 1):
            if number > ROUNDS and all(seen[what] for what in TO_SEE):
                break
            for mask in draw.sample(range(0, PICTURES, 2), 2):
                (lab.masks / f"p{mask}.png").unlink(missing_ok=True)  # for generate to do
            round_of(lab, nurseries, draw, number, versions, seen)
            for stem, path in caches.items():
                latents = load_file(path)["latents_1x14x18_bfloat16"]
                assert any(torch.equal(latents, latents_of(stem, version)) for version in versions), (stem, versions)
        masks = ("--masks", lab.masks)
        assert lab.run("cache", *masks) == 0
        assert lab.run("check", *masks, "--ignore", "missing,full") == 0
        assert lab.run("cache", "--remove") == 0
        left = {name for name in os.listdir(lab.cache) if not name.startswith(".tmp")}  # those are the trainer's
        assert left == {path.name for path in caches.values()}
        assert all(set(load_file(path)) == {"latents_1x14x18_bfloat16", "filler_float32"} for path in caches.values())
    finally:
        assert [nursery.close() for nursery in nurseries] == [0] * len(nurseries)
    assert all(seen[what] for what in TO_SEE), seen


def round_of(lab, nurseries, draw, number, versions, seen):
    """Starts three commands, kills some, waits for all, and holds their statuses against what they said."""
    script = ["--version", str(number)]
    cache = ["cache", "--dataset_config", str(lab.toml), "--arch", "wan", "--masks", str(lab.masks)]
    commands = {
        "cache": [*cache, "--mask_dilate", str(number)],
        "again": [*cache, "--dtype", "float32", "--workers", "2"],
        "remove": [*cache, "--remove"],
        "generate": [
            "generate",
            "--images",
            str(lab.images),
            "--masks",
            str(lab.masks),
            "--backend",
            "grabcut",
        ],
        "encode": [*cache, "--encode", *script],
        "trainer": [
            "trainer",
            "--dataset_config",
            str(lab.folder / "dataset.json"),
            *script,
            *draw.choice([[], ["--in_place"]]),
        ],
    }
    # Two trainers at a time would write two versions: whose is the last one nobody could say.
    kinds = [*draw.sample(["cache", "again", "remove", "generate"], 2), draw.choice(["encode", "trainer", "cache"])]
    draw.shuffle(kinds)
    running = []
    for i, kind in enumerate(kinds):
        log = str(lab.folder / f"log {number} {i}")
        Path(log).touch()  # a kill may come before the first word
        nursery = draw.choice(nurseries)
        running.append((kind, nursery, nursery.ask(run=commands[kind], log=log), log))
        time.sleep(draw.uniform(0, 0.05))
    for kind, nursery, pid, _ in draw.sample(running, len(running)):
        # A trainer that is killed while it writes in place leaves half a file: nobody else can mend that.
        if draw.random() < 0.35 and "--in_place" not in commands[kind]:
            time.sleep(draw.uniform(0, 0.2))
            nursery.ask(kill=pid)
    for kind, nursery, pid, log in running:
        status, said = nursery.ask(wait=pid), Path(log).read_text()
        assert "Traceback" not in said, said
        seen[kind] += 1
        seen["killed"] += status is None
        seen["waited"] += "waits for" in said
        meanwhile = said.count("was written by another program meanwhile") + said.count("is cut short or damaged")
        seen["meanwhile"] += meanwhile
        if "trainer" in kinds and kind != "trainer":
            assert status in (None, 1 if meanwhile else 0), said
        else:
            assert status in (None, 0), said
            assert status is None or not meanwhile, said
        if kind in ("encode", "trainer"):
            if status is not None:
                versions.clear()
            versions.add(number)
