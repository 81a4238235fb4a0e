"""Every name is in exactly one of N shards, on every machine, and the launchers' variables are never misread."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.shard import WHOLE, Shard, parse_shard, shard_of

# Names as a disk has them: any bytes but / and NUL, which Python shows with surrogates where they are no text.
PART = st.binary(min_size=1, max_size=40).map(lambda raw: os.fsdecode(raw.replace(b"/", b"_").replace(b"\0", b"_")))
NAMES = st.lists(st.lists(PART, min_size=1, max_size=3).map("/".join), unique=True)


def slurm(process: int | None = None, tasks: int | None = None, array: tuple[int, ...] = (), **more: str):
    """Slurm's variables; `array` is (number, count, first, last, step) or a beginning of it."""
    names = ("ID", "COUNT", "MIN", "MAX", "STEP")
    found = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in zip(names, array, strict=False)}
    given = {"SLURM_PROCID": process, "SLURM_NTASKS": tasks}
    return {**found, **{name: str(value) for name, value in given.items() if value is not None}, **more}


def torchrun(rank: int, world: int):
    return {"RANK": str(rank), "WORLD_SIZE": str(world)}


def sky(rank: int, count: int, jobs: bool = False):
    names = ("SKYPILOT_JOB_RANK", "SKYPILOT_NUM_JOBS") if jobs else ("SKYPILOT_NODE_RANK", "SKYPILOT_NUM_NODES")
    return dict(zip(names, (str(rank), str(count)), strict=True))


@given(NAMES, st.integers(1, 12))
def test_the_shards_are_disjoint_and_together_the_whole(names, count):
    shards = [{name for name in names if name in Shard(index, count)} for index in range(count)]
    assert sum(map(len, shards)) == len(names)
    assert set().union(*shards) == set(names)


def test_shards_are_about_equal():
    sizes = [sum(f"photos/{i:05d}" in Shard(index, 3) for i in range(3000)) for index in range(3)]
    assert sum(sizes) == 3000
    assert min(sizes) > 900


def test_another_process_and_another_locale_agree():
    """Python's own hash differs from process to process; the encoding of names differs from machine to machine."""
    names = ["a.png", "sub/ä.png", os.fsdecode(b"\xff\xfe.png"), "日本/語"]
    program = "import sys; from masked_loss_triton.files.shard import shard_of; print([shard_of(n, 97) for n in sys.argv[1:]])"
    for change in ({"PYTHONHASHSEED": "1"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        command = [sys.executable, "-c", program, *names]
        out = subprocess.run(command, env={**os.environ, **change}, capture_output=True, check=True)
        assert out.stdout.decode().strip() == str([shard_of(name, 97) for name in names])
    # Every later version has to give these: half of a data set may be done.
    assert [shard_of(name, 97) for name in names] == [45, 79, 35, 49]


@pytest.mark.parametrize(
    ("text", "variables", "expected"),
    [
        (None, torchrun(1, 2), "0/1"),
        ("1/3", {}, "1/3"),
        ("env", torchrun(1, 2), "1/2"),
        ("env", slurm(2, 4), "2/4"),
        ("env", slurm(2, 4, SLURM_JOB_ID="7", SLURM_STEP_ID="0"), "2/4"),
        ("env", sky(1, 2), "1/2"),
        ("env", sky(5, 8, jobs=True), "5/8"),
        ("env", slurm(array=(3, 4)), "3/4"),
        ("env", slurm(0, None, (4, 4, 1, 4, 1)), "3/4"),  # from 1; a batch script always is process 0
        ("env", slurm(None, None, (8, 4, 0, 12, 4)), "2/4"),
        ("env", slurm(1, 2, (3, 4)), "7/8"),  # two processes in each of four jobs
        ("env", {**torchrun(3, 4), **slurm(0, 1)}, "3/4"),  # an allocation of one task
        ("env", {**torchrun(1, 2), **sky(1, 2)}, "1/2"),
        ("torchrun", {**torchrun(3, 4), **slurm(1, 2)}, "3/4"),
    ],
)
def test_shards_are_read(text, variables, expected):
    shard = parse_shard(text, variables)
    assert str(shard) == expected
    assert set(shard.read_from) <= set(variables)
    assert bool(shard.read_from) == (text in ("env", "torchrun"))
    assert (shard == WHOLE) == (text is None)


@pytest.mark.parametrize(
    ("text", "variables", "said"),
    [
        ("3", {}, "is no shard"),
        ("3/3", {}, "no part 3 of 3"),
        ("-1/3", {}, "whole numbers"),
        ("0/0", {}, "no part 0 of 0"),
        ("1/2/3", {}, "whole numbers"),
        ("²/3", {}, "whole numbers"),
        ("env", {}, "SLURM_PROCID/SLURM_NTASKS, RANK/WORLD_SIZE"),
        ("slurm", torchrun(0, 2), "none of SLURM_PROCID/SLURM_NTASKS, SLURM_ARRAY"),
        ("env", {"RANK": "1"}, "WORLD_SIZE is not set"),
        ("env", {"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one'"),
        ("env", torchrun(2, 2), "no part 2 of 2"),
        ("env", {**torchrun(1, 2), **slurm(0, 2)}, "SLURM_PROCID/SLURM_NTASKS says 0/2 but RANK/WORLD_SIZE says 1/2"),
        ("env", slurm(1), "SLURM_NTASKS is not set"),
        # A batch script of a job of four tasks, without srun: it would do a quarter, and nobody the rest.
        ("env", slurm(0, 4, SLURM_JOB_ID="7"), "put srun before it"),
        ("env", slurm(array=(3, 2, 0, 3)), "gaps"),
        ("env", slurm(array=(3, 2, 0, 4, 2)), "gaps"),
        ("env", {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "2"}, "no whole numbers"),
        ("env", {**sky(0, 2, jobs=True), **slurm(array=(1, 2))}, "SLURM_ARRAY_TASK_ID/SLURM_ARRAY_TASK_COUNT says 1/2"),
    ],
)
def test_contradictions_are_refused(text, variables, said):
    with pytest.raises(UserError, match=said) as caught:
        parse_shard(text, variables)
    assert caught.value.exit_status == 2
    assert "I/N" in str(caught.value) or "srun" in str(caught.value)
