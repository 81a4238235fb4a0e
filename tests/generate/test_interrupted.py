"""Runs that are killed or fail in the middle, and what a long run costs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.files.locks import LOCK_NAME
from tests.generate.support import contents, generate, save, subject, words, write_clip


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_and_resumed_gives_the_same_files(folder):
    for seed in range(30):
        save(folder / "in" / f"p{seed:02d}.png", seed)
    for number in range(3):
        write_clip(folder / "in" / f"clip{number}.mp4", [subject(s)[0] for s in range(12)])
    assert generate(folder, out="whole", source="in") == 0
    command = [sys.executable, "-m", "masked_loss_triton", *words(folder)]
    total, partial = len(contents(folder / "whole")), 0
    for enough in (1, 4, 9, 15, 30, 50):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                while process.poll() is None and masks_on_disk(folder / "out") < enough:
                    time.sleep(0.002)
            finally:
                process.kill()
        done = {name for name in contents(folder / "out") if "masktmp" not in name and name != LOCK_NAME}
        partial += 0 < len(done) < total
        for name in done:  # what has its name is whole
            assert (folder / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes()
    assert partial > 1, "hardly a run was killed on its way: the test has shown nothing"
    assert generate(folder) == 0
    assert contents(folder / "out") == contents(folder / "whole")


def masks_on_disk(path):
    """Counted while another process writes and renames there: os.walk passes over folders that have just gone, glob raises."""
    names = (name for _, _, names in os.walk(path) for name in names)
    return sum(name.endswith(".png") and not name.startswith(".") for name in names)


def test_a_folder_of_frames_is_whole_or_not_there(folder, monkeypatch):
    """Killed while the frames are written: nothing under the name of the clip; the next run clears up and does it."""
    from masked_loss_triton.generate import mask_files

    write_clip(folder / "in" / "clip.mp4", [subject(s)[0] for s in range(6)])
    code = f"""
import os, signal, sys
from masked_loss_triton.generate import mask_files
save, count = mask_files._save, 0
def some(*args):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(*args)
mask_files._save = some
from masked_loss_triton.cli import main
main(["generate", "--images", {str(folder / "in")!r}, "--masks", {str(folder / "out")!r}, "--backend", "grabcut"])
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    (left,) = (folder / "out").glob(".*.masktmp")
    assert len(list(left.iterdir())) == 4
    assert generate(folder) == 0
    assert [path.name for path in (folder / "out").iterdir()] == ["clip"]
    assert len(list((folder / "out" / "clip").iterdir())) == 6
    assert mask_files.read_note(folder / "out" / "clip")["backend"] == "grabcut"
    assert generate(folder, "--overwrite", "--invert") == 0
    assert [path.name for path in (folder / "out").iterdir()] == ["clip"]
    with Image.open(folder / "out" / "clip" / "000005.png") as mask:
        assert np.array(mask)[0, 0] == 255


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc: getrusage reports the parent's peak")
def test_memory_is_flat_over_1000_pictures(folder):
    """In a process of its own: its peak after 100 pictures and after 1,000."""
    for seed in range(10):
        save(folder / "in" / f"p{seed}.png", seed)
    for copy in range(10, 1000):
        os.link(folder / "in" / f"p{copy % 10}.png", folder / "in" / f"p{copy}.png")
    code = """
import re, sys
from masked_loss_triton.cli import main
from masked_loss_triton.generate import batches
run, done, peaks = batches.Worker.run, 0, []
def counted(self, batch):
    global done
    outcomes = run(self, batch)
    done += len(batch)
    peaks.append((done, int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])))
    return outcomes
batches.Worker.run = counted
assert main(["generate", *sys.argv[1:], "--backend", "grabcut", "--sheet_limit", "0"]) == 0
early = max(peak for done, peak in peaks if done <= 100)
print("PEAKS", early, peaks[-1][1], peaks[-1][0])
"""
    paths = ["--images", str(folder / "in"), "--masks", str(folder / "out")]
    result = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    early, late, done = map(int, result.stdout.split("PEAKS")[1].split())
    assert done == 1000
    assert len(list((folder / "out").iterdir())) == 1000
    # One picture is 18 KiB and its masks 12: 900 of them kept would be 26 MiB; less than 1 was seen.
    assert (late - early) / 1024 < 8, f"peak {early // 1024} MiB after 100 pictures, {late // 1024} MiB after 1,000"
