"""What Ray gives out again after a worker died is not done again, and is told of as if it had not died."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.cache import on_ray as cache_on_ray
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.inject import prepare
from masked_loss_triton.files.ray_engine import stamp
from masked_loss_triton.generate import on_ray
from masked_loss_triton.generate.batches import Generation
from masked_loss_triton.generate.jobs import find_jobs
from masked_loss_triton.generate.prompts import MaskRequest, Prompt
from tests.cache.support import Lab, disc
from tests.generate.support import contents, subject, write_clip


def inodes(folder):
    """Which file has each name; one that is written again is another file."""
    return {path: path.stat().st_ino for path in folder.rglob("*")}


@pytest.mark.parametrize("clip_suffix", ["", ".mkv"])
@pytest.mark.parametrize("no_detection", ["none", "black"])
@pytest.mark.parametrize("overwrite", ["none", "generated"])
def test_generate(tmp_path, overwrite, no_detection, clip_suffix):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for i in range(3):
        Image.fromarray(subject(i)[0]).save(source / f"p{i}.png")
    small = np.full((64, 96, 3), (20, 50, 90), np.uint8)
    small[28:36, 42:54] = (230, 150, 40)
    Image.fromarray(small).save(source / "small.png")  # too small to be found
    write_clip(source / "c.mp4", [subject(4)[0]] * 3)
    request = MaskRequest(prompts=(Prompt("subject"),), min_size=0.15)
    generation = Generation(
        request=request, masks=out, backend="grabcut", overwrite=overwrite, no_detection=no_detection
    )
    work = on_ray._make(generation)

    def batches():
        jobs = find_jobs(source, out, clip_suffix).jobs
        return [[(job, stamp(job.target)) for job in batch] for batch in generation.batches(jobs)]

    if overwrite == "generated":  # there are older ones
        older = on_ray._make(dataclasses.replace(generation, no_detection="white"))
        for batch in batches():
            older(batch)
    given_out = batches()
    before = inodes(out) if out.exists() else {}
    first = [done for batch in given_out for done in work(batch)]
    written, files = inodes(out), contents(out)
    assert not set(before.items()) & {(path, inode) for path, inode in written.items() if path.suffix}
    again = [done for batch in given_out for done in work(batch)]
    assert inodes(out) == written
    assert contents(out) == files
    told = [(done.job.source.name, done.status, round(done.mean, 4)) for done in first]
    assert [(done.job.source.name, done.status, round(done.mean, 4)) for done in again] == told
    assert {status for _, status, _ in told} == {"written", "nothing"}


def test_a_batch_of_which_a_part_was_written_is_finished(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(4):
        Image.fromarray(subject(i)[0]).save(tmp_path / "in" / f"p{i}.png")
    request = MaskRequest(prompts=(Prompt("subject"),))
    generation = Generation(request=request, masks=tmp_path / "out", backend="grabcut")
    jobs = find_jobs(tmp_path / "in", tmp_path / "out").jobs
    batch = [(job, stamp(job.target)) for job in jobs]
    work = on_ray._make(generation)
    work(batch[:2])
    written = inodes(tmp_path / "out")
    assert [done.status for done in work(batch)] == ["written"] * 4
    assert written.items() <= inodes(tmp_path / "out").items()
    assert len(inodes(tmp_path / "out")) == 4


@pytest.mark.parametrize("options", [{}, {"force": True}, {"remove": True}])
def test_cache(tmp_path, options):
    lab = Lab(tmp_path)
    for i in range(3):
        lab.picture(f"p{i}", mask=disc((160, 120)))
        lab.add_cache(f"p{i}")
    if options:
        assert lab.run("cache", "--masks", lab.masks) == 0
    dataset = dataclasses.replace(lab.dataset(), mask_directory=lab.masks)
    prepared = prepare(dataset, FAMILIES["wan"])
    defaults = {"remove": False, "dtype": "float16", "dry_run": False, "force": False, "debug": True}
    work = cache_on_ray._make([prepared], **{**defaults, **options})
    jobs = [(0, [(item, stamp(item.path)) for item in items]) for items in prepared.jobs()]
    before = inodes(lab.cache)
    first = [outcome for job in jobs for outcome in work(job)]
    written = inodes(lab.cache)
    assert not before.items() & written.items()
    assert [outcome for job in jobs for outcome in work(job)] == first
    assert inodes(lab.cache) == written
    assert {outcome.status for outcome in first} == {"removed" if "remove" in options else "written"}
