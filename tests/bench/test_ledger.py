"""What must hold of bytes, launches, synchronisations and memory. Counted, without a GPU: no time is asserted anywhere."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench.cases import MAIN, Case
from bench.lab.ledger import count, of_recipe, of_torch_backend
from bench.measures import Counting, distinct_bytes
from bench.recipes import RECIPES

LATENTS = (MAIN, "16x33x90x160", "16x1x26x38", "48x31x44x80")


@pytest.fixture(scope="module")
def ledger():
    """The ledger of a process without the interpreter, where launches can be taken down; {(name, latents, prior): entry}."""
    command = [sys.executable, "-m", "bench.lab.ledger", "--json"]
    for latents in LATENTS:
        command += ["--latents", latents]
    hidden = ("TRITON_INTERPRET", "TINYGRAD")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    entries = json.loads(finished.stdout)
    return {(e["name"], e["case"].split()[0].removeprefix("1x"), "prior" in e["case"].split()): e for e in entries}


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("latents", LATENTS)
def test_kernels_move_each_tensor_once(ledger, latents, prior):
    entry = ledger["ours, triton backend", latents, prior]
    # The smallest latents are 63 KB, where a few hundred bytes of partial sums and statistics show in the third digit.
    assert entry["bytes"] <= (4.15 if prior else 3.15)
    assert entry["bytes"] >= (4.0 if prior else 3.0), "fewer bytes than the tensors have: something is not counted"
    assert entry["kernels"] <= 3
    assert entry["synchronisations"] == 0
    assert entry["peak"] <= 1.1


@pytest.mark.parametrize("prior", [False, True])
def test_nothing_but_the_kernels_is_launched(ledger, prior):
    assert ledger["ours, triton backend", MAIN, prior]["launches"] <= 3


@pytest.mark.parametrize("prior", [False, True])
def test_flow_target_is_never_written_to_memory(ledger, prior):
    """Two bfloat16 tensors instead of one float32: the same bytes, and nobody had to form the target."""
    entry = ledger["ours, triton, FlowTarget of bf16", MAIN, prior]
    assert entry["bytes"] <= (3.65 if prior else 3.15)
    assert entry["kernels"] <= 3


@pytest.mark.parametrize("prior", [False, True])
def test_no_recipe_of_the_peers_moves_less_than_three_times_as_much(ledger, prior):
    names = [name for name, recipe in RECIPES.items() if recipe.takes_prior == prior]
    best = min(ledger[name, MAIN, prior]["bytes"] for name in names)
    assert best >= 3 * ledger["ours, triton backend", MAIN, prior]["bytes"]


def test_torch_backend_on_a_device_does_not_wait():
    for prior in (False, True):
        assert of_torch_backend(Case(prior=prior)).synchronisations == 0


def test_ai_toolkit_waits_for_the_device_with_a_prior():
    assert of_recipe("ai-toolkit + prior", Case(prior=True)).synchronisations == 1


# The counter itself, on work whose count is known.


def counted(work, *tensors):
    with Counting() as counts:
        work(*tensors)
    return counts.bytes, counts.launches, counts.synchronisations


def test_counter_counts_inputs_and_outputs_once():
    x, y = torch.empty(100, device="meta"), torch.empty(100, device="meta")
    assert counted(lambda x, y: x + y, x, y) == (1200, 1, 0)
    assert counted(lambda x, y: x * x, x, y) == (800, 1, 0)
    assert counted(lambda x, y: x.add_(y), x, y) == (1200, 1, 0)
    assert counted(lambda x, y: x.copy_(y), x, y) == (800, 1, 0)
    assert counted(lambda x, y: x.zero_(), x, y) == (400, 1, 0)
    assert counted(lambda x, y: torch.mul(x, y, out=torch.empty_like(x)), x, y) == (1200, 1, 0)
    assert counted(lambda x, y: x.view(10, 10).t()[1:].unsqueeze(0), x, y) == (0, 0, 0)


def test_counter_reads_an_expanded_axis_once():
    mask, error = torch.empty(1, 50, device="meta"), torch.empty(16, 50, device="meta")
    assert distinct_bytes(mask.expand(16, 50)) == 200
    assert counted(lambda m, e: m.expand(16, 50) * e, mask, error) == (200 + 3200 + 3200, 1, 0)


def test_counter_sees_every_wait():
    x = torch.empty(4, device="meta")
    assert counted(lambda x: x.sum().item(), x)[2] == 1
    assert counted(lambda x: bool((x > 0).all()), x)[2] == 1
    assert counted(lambda x: x.sum(), x)[2] == 0


def test_counter_knows_the_most_memory_alive():
    x = torch.empty(1000)
    with Counting() as counts:
        y = x + 1
        y = y + 1  # the first result dies here
        del y
        z = x + 2
    assert counts.peak == 8000
    assert z.shape == x.shape


def test_counter_sees_the_backward():
    """mse_loss and its backward: read two and write one number; read two and one and write one tensor."""
    pred = torch.empty(1000, device="meta", requires_grad=True)
    target = torch.empty(1000, device="meta")
    counts = count(lambda: torch.nn.functional.mse_loss(pred, target))
    assert counts.launches == 2
    assert counts.bytes == (8000 + 4) + (8000 + 4 + 4000)
