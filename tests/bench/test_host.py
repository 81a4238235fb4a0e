"""What a call costs the host, counted on Triton's own launchers and a driver that does nothing; no time is asserted."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or shutil.which("cc") is None, reason="for a machine without a GPU and with a C compiler"
)


def in_a_process(code):
    """What `code` prints last, as JSON, where Triton compiles."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore:CUDA initialization", "-c", code]
    finished = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


REPORT = """
import json
from bench import host
print(json.dumps(host.report(rounds=3)))
"""


def test_a_call_makes_few_function_calls_and_every_recipe_has_a_row():
    """Of a form that was seen before, forward and backward: half of them are autograd's and Triton's; the whole way has 2500."""
    from bench.recipes import RECIPES

    rows = in_a_process(REPORT)
    assert len(rows) == len(RECIPES) + 4
    assert all(row["both"] > 0 and row["forward"] > 0 for row in rows)
    counts = {row["case"].endswith("prior"): row["function calls"] for row in rows if row["loss"] == "ours"}
    assert counts[False] <= 105
    assert counts[True] <= 107


ARGUMENTS = """
import json
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime.jit import JITFunction

from bench.cases import build
from bench.lab import null_driver
from bench.lab.variants import VARIANTS
from masked_loss_triton import masked_loss
from masked_loss_triton.kernels.sums import Outputs
from masked_loss_triton.kernels.upstream import Upstream

driver = null_driver.install()
seen, made = [], CudaLauncher.__init__


def make(self, source, metadata):
    "Keeps what is given to Triton's launcher in C, which every launch ends in."
    made(self, source, metadata)
    in_c, name = self.launch, source.fn.__name__
    self.launch = lambda *given: (seen.append([name, *tree_leaves(given)]), in_c(*given))


def launches(call, stats):
    "Every launch of forward and backward, addresses by what lies there; scratch by the order in which it is met."
    seen.clear()
    keywords = dict(call.keywords, layout=call.layout, return_stats=stats, backend="triton")
    if call.prior is not None and call.config.per_sample:
        keywords |= dict(prior_weight=torch.full((len(call.prior),), 0.25))
    elif call.prior is not None:
        keywords |= dict(prior_weight=0.25)  # as trainers give it
    found = masked_loss(call.pred, call.target, call.mask, call.config, **keywords)
    loss, numbers = found if stats else (found, None)
    grad_output = torch.ones(())
    (gradient,) = torch.autograd.grad(loss, call.pred, grad_output)
    noise, latents = (call.target.noise, call.target.latents) if hasattr(call.target, "noise") else (call.target, None)
    named = dict(pred=call.pred, target=noise, latents=latents, mask=call.mask, prior=call.prior, loss=loss, gradient=gradient)
    if torch.is_tensor(keywords.get("prior_weight")):
        named |= dict(prior_weight=keywords["prior_weight"])
    named |= dict(grad_output=grad_output, numbers=None if numbers is None else numbers[0])
    places = {x.data_ptr(): name for name, x in named.items() if x is not None}
    tensors = set()
    for launch in seen:
        tensors |= {leaf.data_ptr() for leaf in launch if isinstance(leaf, torch.Tensor)}

    def name(leaf):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.data_ptr()
        if isinstance(leaf, int) and (leaf in places or leaf > 2**40):
            return places.setdefault(leaf, f"scratch {len(places)}")
        return "None" if type(leaf).__name__ in ("LazyDict", "HookChain") else repr(leaf)  # for hooks, of which there is none

    launches = [list(map(name, launch)) for launch in seen]
    # The kernel is that of the loss, but the backward writes no loss: where it would, each way has its own place.
    place = launches[-1].index("grad_output") + len(Upstream._fields)
    launches[-1][place : place + len(Outputs._fields)] = [None] * len(Outputs._fields)
    return launches


FEW = (
    "main", "main bf16", "prior threshold", "flow and prior", "stats", "no mask", "pixels uint8 bf16", "pixels blur",
    "channels last", "layered bf16 flow prior", "26x38",
)  # fmt: skip
found = {}
with mock.patch.object(CudaLauncher, "__init__", make):
    for variant in FEW:
        case = VARIANTS[variant]
        whole = launches(build(case, filled=False), case.stats)
        with mock.patch.object(JITFunction, "run", side_effect=AssertionError("searched for a kernel")):
            again = launches(build(case, filled=False), case.stats)
        found[variant] = whole, again
print(json.dumps(found))
"""


def test_the_arguments_that_reach_the_launcher_are_those_of_the_whole_way():
    """Grids, kernels and every argument; an address is named by what lies there. Nothing searches for a kernel the second time."""
    for variant, (whole, again) in in_a_process(ARGUMENTS).items():
        assert again == whole, variant
        assert {launch[0].strip("'") for launch in whole} >= {"weights_kernel", "loss_kernel"}


HARDWARE = """
import json, os
from types import SimpleNamespace
from unittest import mock

import torch

from bench.lab import null_driver
from masked_loss_triton.kernels.devices import hardware

null_driver.install(start=False)
found = []
for major, wanted in ((9, None), (12, "1"), (8, None), (9, "0")):
    os.environ |= {} if wanted is None else {"MASKED_LOSS_OVERLAP": wanted}
    properties = SimpleNamespace(multi_processor_count=132, major=major)
    with mock.patch.object(torch.cuda, "get_device_properties", return_value=properties):
        found.append(hardware.__wrapped__(torch.device("cuda", 0)))
print(json.dumps(found))
"""


def test_kernels_overlap_from_sm_90_on_unless_somebody_switches_it_off():
    """The version comes from the driver itself, here the one that does nothing: it says 13.0."""
    assert in_a_process(HARDWARE) == [[132, True], [132, True], [132, False], [132, False]]
