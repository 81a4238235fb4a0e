"""Two processes, started as a user starts them, train what one process trains on batches of twice the size."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.examples.test_train_diffusers import assert_close, run
from tests.support.caches import caches

SCRIPT = Path(__file__).parents[2] / "examples" / "train_diffusers.py"


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss (\d+\.\d+)", text)]


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["", "--normalize_per_sample"], ids=["batch", "sample"])
def test_two_processes_are_one_with_twice_the_batch(flags, tmp_path, capsys):
    lab = caches(tmp_path / "data", "wan", stems="abce")
    common = ["--steps", 3, "--log_every", 1, "--gradient_accumulation_steps", 2, "--learning_rate", 0.01]
    common += ["--prior_weight", 0.5, *flags.split()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # torchrun: without a GPU `accelerate launch` starts one process only.
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_addr", "127.0.0.1", "--master_port", port]
    command = [sys.executable, *launch, SCRIPT, "--arch", "wan", "--tiny", "--cpu", "--workers", 0]
    command += ["--cache", lab.cache, "--output", tmp_path / "two", "--batch_size", 1, *common]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=240, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "2 processes" in result.stdout
    one = run(lab, tmp_path / "one", "--batch_size", 2, *common)
    expected = losses(capsys.readouterr().out)
    assert len(expected) == 3
    assert losses(result.stdout) == pytest.approx(expected, rel=1e-5)
    assert_close(load_file(tmp_path / "two" / "pytorch_lora_weights.safetensors"), one, 1e-3)
