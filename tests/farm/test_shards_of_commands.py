"""Shards of generate and cache, at the same time and in one folder, give the files of one process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from masked_loss_triton.cli import main
from tests.cache.support import Lab, disc, frames_of, video_lab
from tests.generate.support import contents, generate, subject, write_clip


def start(command, *flags, **variables):
    return subprocess.Popen(
        [sys.executable, "-m", "masked_loss_triton", command, *map(str, flags)],
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def problems_in(said):
    return [line for line in said.splitlines() if line.startswith("masked-loss generate: /")]


@pytest.fixture
def photos(tmp_path):
    """Pictures in two folders, a clip, one that is none, two of one stem."""
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for i in range(9):
        Image.fromarray(subject(i)[0]).save(tmp_path / "in" / ("sub" if i % 2 else ".") / f"p{i}.png")
    Image.fromarray(subject(1)[0]).save(tmp_path / "in" / "p2.webp")
    (tmp_path / "in" / "damaged.png").write_bytes(b"no picture")
    write_clip(tmp_path / "in" / "p4.mp4", [subject(2)[0]] * 2)
    return tmp_path


def test_shards_of_generate_at_the_same_time_are_one_run(photos, capsys):
    assert generate(photos, "--sheet_limit", "5") == 1
    one = capsys.readouterr()
    paths = ["--images", photos / "in", "--masks", photos / "shards", "--backend", "grabcut"]
    running = [
        start("generate", *paths, "--shard", "env", SLURM_ARRAY_TASK_ID=str(i), SLURM_ARRAY_TASK_COUNT="3")
        for i in range(3)
    ]
    said = [process.communicate() for process in running]
    assert contents(photos / "out") == contents(photos / "shards")
    assert not [path for path in (photos / "shards").rglob(".*")]
    assert "shard 1/3, from SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT" in said[1][1]
    assert not any("waits" in err for _, err in said)
    # Each problem is told by one shard, and its exit status says so; every shard has its own contact sheet.
    told = [problems_in(out + err) for out, err in said]
    problems = sorted(line for lines in told for line in lines)
    assert problems == sorted(problems_in(one.out + one.err))
    assert len(problems) == 2
    assert sum(int(re.search(r"(\d+) masks written", out)[1]) for out, _ in said) == 10
    codes = [process.returncode for process in running]
    assert codes == [int(bool(lines)) for lines in told]
    assert sorted(path.name for path in photos.glob("shards_sheet*.png")) == [
        f"shards_sheet_{i}of3.png" for i in range(3)
    ]


def test_a_shard_keeps_out_itself_other_numbers_and_whole_runs(photos):
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files import locks
    from masked_loss_triton.files.shard import WHOLE, Shard, shard_lock

    def enters(shard, run=""):
        try:
            with shard_lock(photos, "x", shard, run):
                return True
        except UserError:
            return False

    wait, locks.folder_lock.__wrapped__.__kwdefaults__["longest_wait"] = 600.0, 0.0
    try:
        with shard_lock(photos, "x", Shard(1, 3), "run"):
            assert enters(Shard(0, 3))
            assert enters(Shard(1, 3), "run")
            assert not enters(Shard(1, 3))
            assert not enters(Shard(1, 3), "another run")
            assert not enters(Shard(1, 4))
            assert not enters(WHOLE)
            assert not enters(WHOLE, "run")
        assert enters(WHOLE)
    finally:
        locks.folder_lock.__wrapped__.__kwdefaults__["longest_wait"] = wait
    assert sorted(os.listdir(photos)) == ["in"]


@pytest.mark.parametrize("clips", [False, True])
def test_shards_of_cache_are_one_run(tmp_path, clips):
    if clips:
        lab = video_lab(tmp_path, frames_of(9))
        for i in range(6):
            shutil.copy(lab.images / "clip.mp4", lab.images / f"c{i}.mp4")
        stems = [f"c{i}_{start:05d}-005" for i in range(6) for start in (0, 4)]
        for stem in stems:
            lab.add_cache(stem, (128, 128), frames=2)
    else:
        lab = Lab(tmp_path)
        stems = [f"p{i}" for i in range(12)]
        for i, stem in enumerate(stems):
            lab.picture(stem, mask=disc((160, 120)) if i % 4 else None)
            lab.add_cache(stem)
    before = contents(lab.cache)
    assert lab.run("cache", "--masks", lab.masks) == 0
    one = contents(lab.cache)
    assert one != before
    for name, content in before.items():
        (lab.cache / name).write_bytes(content)
    flags = ["--dataset_config", lab.toml, "--arch", "wan", "--masks", lab.masks]
    running = [start("cache", *flags, "--shard", f"{i}/3") for i in range(3)]
    said = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0] * 3, said
    assert contents(lab.cache) == one
    written = [int((re.search(r"(\d+) masks written", out) or [0, 0])[1]) for out, _ in said]
    assert sum(written) == len(one)
    # The windows of a clip are in one shard: each clip is decoded once.
    assert all(count % (2 if clips else 1) == 0 for count in written)
    assert lab.run("cache", "--remove", "--shard", "0/3") == 0
    left = sum(content == one[name] for name, content in contents(lab.cache).items())
    assert left == len(one) - written[0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shard", "3/3"], "no part 3 of 3"),
        (["--shard", "env"], "is set"),
        (["--ray_address", "a:1"], "belongs to --engine ray"),
        (["--num_gpus", "1"], "belongs to --engine ray"),
        (["--engine", "ray", "--num_gpus", "nan"], "0 or more"),
        (["--engine", "ray", "--ray_address", "ray://a:1"], "ray job submit"),
        (["--shard", "0/2", "--encode"], "leave out --shard"),
    ],
)
def test_flags_that_make_no_sense_are_refused(photos, capsys, monkeypatch, flags, said):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if "--encode" in flags:
        lab = Lab(photos / "lab")
        assert lab.run("cache", *flags) == 2
    else:
        paths = ["--images", str(photos / "in"), "--masks", str(photos / "out")]
        assert main(["generate", *paths, "--backend", "grabcut", *flags]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert err.startswith("masked-loss ")
