"""The shards of check, put together, say what one process says: problems that only the whole shows included."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.cache.support import Lab, disc


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A dataset with problems of pictures, of caches, of names, and of the whole."""
    lab = Lab(tmp_path_factory.mktemp("check"))
    for i in range(12):
        lab.picture(f"p{i}", mask=disc((160, 120)))
        if i != 3:  # not cached
            lab.add_cache(f"p{i}")
    # Every third is masked with other operations, and two not at all: both are seen only by looking at all.
    assert lab.run("cache", "--masks", lab.masks, "--mask_dilate", "2") == 0
    assert lab.run("cache", "--masks", lab.masks, "--shard", "1/3") == 0
    for stem in ("p5", "p9"):
        lab.add_cache(stem)
    for stem in ("unused1", "unused2", os.fsdecode(b"unused\xff")):
        shutil.copy(lab.masks / "p0.png", lab.masks / f"{stem}.png")
    Image.open(lab.masks / "p1.png").save(lab.masks / "p1.webp")  # ambiguous
    Image.fromarray(np.zeros((120, 160), np.uint8)).save(lab.masks / "p2.png")
    lab.picture("broken", mask=disc((160, 120))).write_bytes(b"no picture")
    lab.add_cache("orphan")
    return lab


def check(lab, capsys, *flags):
    """(exit status, standard output)"""
    status = lab.run("check", "--masks", lab.masks, *flags)
    return status, capsys.readouterr().out


def merge(capsys, *flags):
    from masked_loss_triton.cli import main

    status = main(["check", "--merge", *map(str, flags)])
    return status, capsys.readouterr()


def shards(lab, capsys, tmp_path, count, *flags):
    """The outputs of all shards, as files in an order of their own, and what each exit status was."""
    files, statuses = [], []
    for index in reversed(range(count)):
        status, out = check(lab, capsys, "--json", "--shard", f"{index}/{count}", *flags)
        files.append(tmp_path / f"{index}of{count}.json")
        files[-1].write_text(out)
        statuses.append(status)
    return files, statuses


@pytest.mark.parametrize("flags", [(), ("--mask_dilate", "2"), ("--ignore", "mixed,size,unused")])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_merged_shards_are_one_process(lab, capsys, tmp_path, count, flags):
    files, statuses = shards(lab, capsys, tmp_path, count, *flags)
    for json_flag in ((), ("--json",)):
        status, out = check(lab, capsys, *flags, *json_flag)
        merged, said = merge(capsys, *files, *json_flag)
        assert (merged, said.out) == (status, out)
    found = json.loads(out)
    kinds = {line["kind"] for line in found}
    wanted = {"unreadable", "ambiguous", "uncached", "orphan", "empty", "unmasked", "options"}
    assert wanted | ({"mixed", "unused"} - set("".join(flags[1:]).split(","))) <= kinds
    # Each shard's own exit status is true, and each problem that is not of the whole is in one shard.
    parts = [json.loads(file.read_text()) for file in files]
    own = [[line for dataset in part["datasets"] for line in dataset["problems"]] for part in parts]
    ignored = set(parts[0]["ignored"])
    assert all(
        status == 1
        for status, lines in zip(statuses, own, strict=True)
        if {p["kind"] for p in lines} - ignored - {"options"}
    )
    for kind in {"unused", "ambiguous", "uncached", "orphan", "unreadable"} - ignored:
        names = [line["file"] for lines in own for line in lines if line["kind"] == kind]
        assert sorted(names) == sorted(line["file"] for line in found if line["kind"] == kind)
    assert sum(part["pictures"] for part in parts) == 13
    assert sum(part["caches"] for part in parts) == 12


def test_a_shard_without_problems_ends_with_0(lab, capsys):
    statuses = {}
    for index in range(40):
        status, out = check(lab, capsys, "--shard", f"{index}/40", "--ignore", "options")
        statuses.setdefault(status, []).append(out)
        assert f"in shard {index}/40" in out
    assert set(statuses) == {0, 1}
    assert all(" 0 problems in shard" in out for out in statuses[0])
    assert not any(" 0 problems in shard" in out for out in statuses[1])


def test_what_cannot_be_merged_is_refused(lab, capsys, tmp_path):
    files, _ = shards(lab, capsys, tmp_path, 3)
    other = tmp_path / "other"
    other.mkdir()
    of_two, _ = shards(lab, capsys, other, 2)
    dilated, _ = shards(lab, capsys, other, 3, "--mask_dilate", "1")
    (tmp_path / "plain.json").write_text(check(lab, capsys, "--json")[1])
    (tmp_path / "half.json").write_text(files[0].read_text()[:100])
    for given, said in (
        (files[:2], "shard 0/3 is absent"),
        (files[:1], "shard 0/3, 1/3 is absent"),
        ([*files, files[0]], "shard 2/3 is there twice"),
        ([files[0], files[1], of_two[0]], "another number of shards"),
        ([files[0], files[1], dilated[2]], "other options"),
        ([tmp_path / "plain.json"], "is not the output of check"),
        ([tmp_path / "half.json"], "is not the output of check"),
        ([tmp_path / "none.json"], "No such file"),
    ):
        status, output = merge(capsys, *given)
        assert status == 2
        assert said in output.err
        assert output.out == ""
    assert lab.run("check", "--merge", files[0]) == 2
    assert "leave out --dataset_config" in capsys.readouterr().err


def test_neither_dataset_nor_merge_is_refused(capsys):
    from masked_loss_triton.cli import main

    assert main(["check"]) == 2
    assert "--dataset_config, or --merge" in capsys.readouterr().err
