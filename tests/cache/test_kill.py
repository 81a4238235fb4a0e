"""Killed at any moment, the cache command leaves files that load: the old one or the new one, never half."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.cache.support import Lab, disc

ITEMS, KILLS = 24, 60

# Imports once, then for every line of input a child that runs the command over and over, between two options, so that there
# is always something to write. The children are killed.
NURSERY = """
import os, sys
from masked_loss_triton.cli import main
import masked_loss_triton.cache.inject, cv2, PIL.PngImagePlugin
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr
        turn = int(line)
        while True:
            turn += 1
            main(["cache", *sys.argv[1:], "--mask_dilate", str(1 + turn % 2)])
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_every_cache_loads_after_sigkill_at_random_moments(tmp_path):
    lab = Lab(tmp_path)
    originals = {}
    for i in range(ITEMS):
        lab.picture(f"p{i}", mask=disc((160, 120), (i / ITEMS, 0.5)))
        path = lab.add_cache(f"p{i}", extra={"filler_float32": torch.randn(200, 1000)})
        originals[path] = load_file(path)
    draw = random.Random(11)
    masked, leftovers = 0, 0
    flags = map(str, ("--dataset_config", lab.toml, "--arch", "wan", "--masks", lab.masks))
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    )
    with nursery:
        assert nursery.stdin is not None
        assert nursery.stdout is not None
        for turn in range(KILLS):
            nursery.stdin.write(f"{turn}\n")
            child = int(nursery.stdout.readline())
            time.sleep(draw.uniform(0, 0.25))
            os.kill(child, signal.SIGKILL)
            assert os.WTERMSIG(int(nursery.stdout.readline())) == signal.SIGKILL
            leftovers += sum(name.endswith(".masktmp") for name in os.listdir(lab.cache))
            for path, tensors in originals.items():
                loaded = load_file(path)
                for name, tensor in tensors.items():
                    assert torch.equal(loaded.pop(name), tensor)
                for weights in loaded.values():
                    masked += 1
                    assert 0 < float(weights.float().mean()) < 1
        nursery.stdin.close()
    assert nursery.returncode == 0
    assert masked > 0, "no run got far enough to write: the test has shown nothing"
    assert leftovers > 0, "no run was killed while it wrote: the test has shown nothing"
    assert lab.run("cache", "--masks", lab.masks, "--mask_dilate", "9") == 0
    assert sorted(os.listdir(lab.cache)) == sorted(path.name for path in originals)
    assert all(np.isfinite(one.float().numpy()).all() for path in originals for one in load_file(path).values())
