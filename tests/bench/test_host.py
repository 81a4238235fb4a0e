"""The benchmark of the host's time looks up what a call launches; no time is asserted."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CODE = """
import torch
from bench import host
from bench.recipes import RECIPES
found = []
host._looked_up, look_up = lambda kernel, *a, **k: (found.append(kernel.__name__), look_up(kernel, *a, **k)), host._looked_up
rows = host.report(rounds=1)
assert len(rows) == len(RECIPES) + 2, rows
assert all(row["both"] > 0 and row["forward"] > 0 for row in rows)
if not torch.cuda.is_available():
    assert set(found) == {"weights_kernel", "loss_kernel", "scale_kernel"}
    assert found.count("scale_kernel") * 2 == found.count("loss_kernel") == found.count("weights_kernel")
"""


def test_every_recipe_has_a_row_and_a_call_looks_up_three_launches():
    hidden = ("TRITON_INTERPRET",)
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    finished = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
