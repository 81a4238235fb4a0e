"""The compiled code, executed: the reference's numbers, nothing out of bounds, full sectors, the bytes of the ledger."""

import json
import os
import subprocess
import sys

import pytest

from bench.lab import emulate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulate.why_unavailable() is not None, reason=f"no emulator: {emulate.why_unavailable()}"),
]
CHECKED = (
    "26x38",
    "42x24",
    "21x60x104",
    "26x38 bf16",
    "42x24 bf16",
    "26x38 prior",
    "26x38 channels last",
    "32x48 pixels uint8",
    "21x60x104 pixels",
    "21x60x104 one frame bf16",
    "26x38 accumulated",
    "26x38 fp16 scaled",
)


def run(*command):
    """Standard output of a tool, in a process where kernels are compiled and not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *command]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_the_emulator_executes_what_triton_emits():
    assert run("bench.lab.emulator.selfcheck").splitlines()[-1] == "0 failed"


@pytest.fixture(scope="module")
def results():
    cases = [word for name in CHECKED for word in ("--case", name)]
    lines = run("bench.lab.emulate", "--json", *cases).splitlines()  # fails at an access out of bounds
    return {result["name"]: result for result in map(json.loads, lines)}


@pytest.mark.parametrize("name", CHECKED)
def test_compiled_code_gives_the_numbers_of_the_reference(results, name):
    assert results[name]["loss_error"] <= 1e-6
    assert results[name]["gradient_error"] <= 1


@pytest.mark.parametrize("name", CHECKED)
def test_sectors_are_full(results, name):
    for tensor in ("pred", "target", "gradient"):
        assert results[name]["fullness"][f"loss_kernel.{tensor}"] >= 0.95, tensor


@pytest.mark.parametrize(
    "name", ["26x38", "21x60x104", "21x60x104 pixels", "32x48 pixels uint8", "21x60x104 one frame bf16"]
)
def test_sectors_of_the_mask_are_full_whatever_its_grid(results, name):
    assert results[name]["fullness"]["weights_kernel.mask"] >= 0.95


@pytest.mark.parametrize("name", ["26x38", "42x24", "21x60x104", "26x38 prior", "26x38 accumulated"])
def test_executed_bytes_are_those_of_the_ledger(results, name):
    """Each launch asks at least once for every byte that the ledger says, and for no other."""
    assert results[name]["distinct"] <= (4.15 if "prior" in name else 3.15) * results[name]["bytes_of_pred"]
    assert results[name]["launches"] <= 3


@pytest.mark.parametrize("name", CHECKED)
def test_a_backward_that_was_foreseen_touches_no_tensor(results, name):
    """bench/lab/ledger.py counts on it. (The two numbers that it compares are scalar loads, which the emulator does not count.)"""
    assert not any(tensor.startswith("backward.") for tensor in results[name]["moved"])
