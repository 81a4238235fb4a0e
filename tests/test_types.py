"""What an editor or mypy tells a user: return types of both calls, and wrong words before anything runs."""

import subprocess
import sys
import textwrap

import masked_loss_triton

SNIPPET = """
import torch
from masked_loss_triton import MaskedLoss, MaskedLossConfig, MaskedLossStats, masked_loss

x = torch.zeros(1, 4, 1, 8, 8)
loss: torch.Tensor = masked_loss(x, x, None, MaskedLossConfig(normalization="mean_one"), backend="torch")
both: tuple[torch.Tensor, MaskedLossStats] = masked_loss(x, x, None, return_stats=True, prior=x, prior_weight=0.5)
of_module: torch.Tensor = MaskedLoss(gamma=0.7)(x, x, None, weighting=torch.ones(1))
both_of_module: tuple[torch.Tensor, MaskedLossStats] = MaskedLoss()(x, x, None, return_stats=True)
numbers: dict[str, float] = both[1].to_dict()
MaskedLossConfig.preset("sd-scripts")
"""
WRONG = """
a: int = masked_loss(x, x, None)
b: torch.Tensor = masked_loss(x, x, None, return_stats=True)
c = masked_loss(x, x, None, backend="cuda")
d = masked_loss(x, x, None, layout="nhwc")
e = masked_loss(x, x, None, gamma=2.0)
f: int = MaskedLoss()(x, x, None)
MaskedLossConfig(normalization="weighted_meen")
MaskedLossConfig(loss_type="l2")
MaskedLossConfig(floor="max")
MaskedLossConfig(resample="lanczos")
MaskedLossConfig.preset("kohya")
"""


def test_mypy_passes_right_calls_and_marks_every_wrong_one(tmp_path):
    file = tmp_path / "snippet.py"
    file.write_text(textwrap.dedent(SNIPPET + WRONG), encoding="utf-8")
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", f"--cache-dir={cache}", str(file)]
    out = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    marked = {int(line.split(":")[1]) for line in out.splitlines() if line.startswith(str(file)) and ": error:" in line}
    first = SNIPPET.count("\n") + 2
    assert marked == set(range(first, first + WRONG.count("\n") - 1)), out


def test_dir_shows_each_public_name_once():
    names = [name for name in dir(masked_loss_triton) if not name.startswith("__")]
    assert names == sorted(masked_loss_triton.__all__)
