"""Workers and the command itself killed on a real Ray: the files of one process, each written once, and nothing left over.

MASKED_LOSS_FARM=500x10 kills 10 times while 500 pictures are masked; CI does a smaller one.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter

import pytest
from PIL import Image

from tests.cache.support import Lab, disc
from tests.generate.support import contents, generate, subject

pytest.importorskip("ray")
PICTURES, KILLS = map(int, os.environ.get("MASKED_LOSS_FARM", "48x3").split("x"))
MOVED_TO, CREATE = 0x80, 0x100  # of inotify: names that are renamed into a folder, and files made in it
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="counts writes with inotify, finds workers in /proc")


class Writes:
    """Counts the files that get their name in a folder, by the kernel's own word."""

    def __init__(self, folder):
        libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = libc.inotify_init1(os.O_NONBLOCK)
        assert self.descriptor >= 0
        assert libc.inotify_add_watch(self.descriptor, os.fsencode(folder), MOVED_TO) >= 0
        self.counts: Counter[str] = Counter()

    def read(self):
        """The counts so far, by name."""
        while True:
            try:
                events = os.read(self.descriptor, 1 << 20)
            except BlockingIOError:
                return self.counts
            place = 0
            while place < len(events):
                _, mask, _, length = struct.unpack_from("iIII", events, place)
                assert mask & MOVED_TO, f"the kernel's queue was too short: {mask:#x}"
                name = events[place + 16 : place + 16 + length].rstrip(b"\0")
                self.counts[os.fsdecode(name)] += 1
                place += 16 + length

    def close(self):
        os.close(self.descriptor)


def workers_of(session):
    """The processes of a session that are workers of Ray at work, by what /proc says."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                same = int(file.read().rpartition(")")[2].split()[3]) == session
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if same and file.read().startswith(b"ray::MapWorker"):
                    found.append(int(name))
        except OSError:
            continue
    return found


def run_and_kill(command, folder, names, seed):
    """Runs the command until it ends by itself; kills a worker or the command itself at KILLS random moments of the work.

    Returns its last output, what was killed, and how often each name was written.
    """
    draw, killed = random.Random(seed), []
    writes = Writes(folder)
    # The numbers of written files at which something is killed; the command and its workers in turn.
    moments = sorted(draw.sample(range(1, len(names) - 2), KILLS))
    try:
        while True:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
            )
            while process.poll() is None:
                written = sum(count for name, count in writes.read().items() if name in names)
                if moments and written >= moments[0]:
                    time.sleep(draw.uniform(0, 0.05))
                    moments.pop(0)
                    workers = workers_of(process.pid)
                    victim = draw.choice(workers) if len(killed) % 2 == 0 and workers else process.pid
                    os.kill(victim, signal.SIGKILL)
                    killed.append("command" if victim == process.pid else "worker")
                time.sleep(0.005)
            out, _ = process.communicate()
            if process.returncode != -signal.SIGKILL:
                return process.returncode, out, killed, {n: c for n, c in writes.read().items() if n in names}
    finally:
        writes.close()


@pytest.mark.slow
@on_linux
def test_generate_on_ray_killed_at_random_moments(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for i in range(PICTURES):
        Image.fromarray(subject(i, (48, 32))[0]).save(tmp_path / "in" / f"p{i:03d}.png")
    assert generate(tmp_path, out="one") == 0
    whole = contents(tmp_path / "one")
    paths = ["--images", str(tmp_path / "in"), "--masks", str(tmp_path / "out"), "--sheet_limit", "0"]
    command = [sys.executable, "-m", "masked_loss_triton", "generate", *paths, "--backend", "grabcut"]
    command += ["--engine", "ray", "--workers", "2"]
    status, out, killed, written = run_and_kill(command, tmp_path / "out", set(whole), 5)
    assert status == 0, out
    assert len(killed) == KILLS
    assert {"worker", "command"} <= set(killed), "the test has shown little"
    assert contents(tmp_path / "out") == whole, "other files, or something left over"
    assert written == dict.fromkeys(whole, 1), "something was written twice"


@pytest.mark.slow
@on_linux
def test_cache_on_ray_killed_at_random_moments(tmp_path):
    lab = Lab(tmp_path)
    count = PICTURES if "MASKED_LOSS_FARM" in os.environ else 24
    for i in range(count):
        lab.picture(f"p{i}", mask=disc((160, 120), (i / count, 0.5)) if i % 6 else None)
        lab.add_cache(f"p{i}")
    before = contents(lab.cache)
    flags = ["--dataset_config", str(lab.toml), "--arch", "wan", "--masks", str(lab.masks)]
    assert lab.run("cache", "--masks", lab.masks) == 0
    whole = contents(lab.cache)
    for name, content in before.items():
        (lab.cache / name).write_bytes(content)
    command = [sys.executable, "-m", "masked_loss_triton", "cache", *flags, "--engine", "ray", "--workers", "2"]
    status, out, killed, written = run_and_kill(command, lab.cache, set(whole), 6)
    assert status == 0, out
    assert len(killed) == KILLS
    assert contents(lab.cache) == whole, "other files, or something left over"
    assert written == dict.fromkeys(whole, 1), "something was written twice"


LEAVES_A_TEMPORARY_FILE = """
import os, subprocess, sys
from masked_loss_triton.cache import on_ray as cache
from masked_loss_triton.cli import main
from masked_loss_triton.generate import on_ray as generate
folder, *words = sys.argv[1:]
module, name = {"cache": (cache, "inject_on_ray"), "generate": (generate, "generate_masks_on_ray")}[words[0]]
work = getattr(module, name)
writer = '''
import os, signal, sys
from masked_loss_triton.files.atomic import replace_file
replace_file(sys.argv[1], lambda file: os.kill(os.getpid(), signal.SIGKILL))
'''
def work_and_die(*given, **named):
    yield from work(*given, **named)
    subprocess.run([sys.executable, "-c", writer, folder + "/left"])
    print("left", [name for name in os.listdir(folder) if name.endswith("masktmp")], flush=True)
setattr(module, name, work_and_die)
sys.exit(main(words))
"""


@pytest.mark.slow
@on_linux
@pytest.mark.parametrize("command", ["generate", "cache"])
def test_what_the_last_worker_to_die_left_is_removed(tmp_path, command):
    """The run goes on with the others, and no later one is needed to clear up."""
    lab = Lab(tmp_path)
    lab.picture("p", mask=disc((160, 120)) if command == "cache" else None)
    lab.add_cache("p")
    folder = lab.cache if command == "cache" else lab.masks
    flags = {
        "generate": ["--images", lab.images, "--backend", "grabcut", "--sheet_limit", "0"],
        "cache": ["--dataset_config", lab.toml],
    }
    words = [folder, command, *flags[command], "--masks", lab.masks, "--engine", "ray", "--workers", "1"]
    python = [sys.executable, "-c", LEAVES_A_TEMPORARY_FILE, *map(str, words)]
    finished = subprocess.run(python, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "left ['.left." in finished.stdout
    assert not any("masktmp" in path for path in os.listdir(folder))
