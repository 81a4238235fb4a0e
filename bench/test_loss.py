"""Time and memory of the loss: eager recipes of the peers, torch.compile of the best of them, ours. `make bench` runs this.

Each measurement is one (case, loss, part). Part "forward" keeps the graph, as training does; "backward" is measured alone; "both"
is what a step pays. Two rows are yardsticks: "copy" moves between two tensors that exist, "floor" reads pred, target (and prior)
once and writes one fresh tensor of the size of pred: no loss with a gradient can move less.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.cases import LARGE, LATENTS, MAIN, MASKS, Call, Case, build, short
from bench.measures import FLUSH, peak_memory, seconds
from bench.recipes import RECIPES
from masked_loss_triton import masked_loss

Tensor = torch.Tensor
FP32, BF16 = torch.float32, torch.bfloat16
BEST = "blissful"  # of the eager recipes it moves the fewest bytes (python -m bench.lab.ledger), and means what our default means
PARTS = ("forward", "backward", "both")


def default_cases() -> list[Case]:
    return [
        Case(latents=latents, dtype=dtype, prior=prior)
        for latents in (MAIN, LARGE)
        for dtype in (FP32, BF16)
        for prior in (False, True)
    ]


def all_cases() -> list[Case]:
    cases = [
        Case(latents=latents, dtype=dtype, prior=prior, mask=mask)
        for latents in LATENTS
        for dtype in (FP32, BF16)
        for prior in (False, True)
        for mask in ("latent", "pixels")
    ]
    assert {case.mask for case in cases} <= set(MASKS)
    return cases


def losses_of(case: Case) -> list[str]:
    names = [name for name, recipe in RECIPES.items() if recipe.takes_prior == case.prior]
    suffix = " + prior" if case.prior else ""
    ours = ["ours, torch", "ours, torch.compile", *["ours, triton"] * torch.cuda.is_available()]
    return [*names, f"torch.compile of {BEST}{suffix}", *ours]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = all_cases() if metafunc.config.getoption("--all-cases") else default_cases()
    if "loss" in metafunc.fixturenames:
        pairs = [(case, loss) for case in cases for loss in losses_of(case)]
        metafunc.parametrize(("case", "loss"), pairs, ids=[f"{case.name}-{loss}" for case, loss in pairs])
    else:
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@functools.lru_cache(maxsize=1)
def tensors(case: Case, device: torch.device) -> Call:
    """Of the last case only: the suite goes through the cases one by one."""
    gc.collect()
    return build(case, device)


@functools.lru_cache(maxsize=4)
def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


def computation(loss: str, call: Call) -> Callable[[], Tensor]:
    """The forward: a function of nothing that returns the loss."""
    if loss.startswith("ours"):
        backend = loss.removeprefix("ours, ").removesuffix(".compile")
        ours = compiled(masked_loss) if loss.endswith(".compile") else masked_loss
        return lambda: ours(call.pred, call.target, call.mask, call.config, prior=call.prior, backend=backend)
    name = loss.removeprefix("torch.compile of ")
    function = RECIPES[name].function
    function = compiled(function) if name != loss else function
    return lambda: function(call.pred, call.target, call.mask, call.prior)


@pytest.mark.parametrize("part", PARTS)
def test_loss(benchmark, device, rounds, case, loss, part):
    call = tensors(case, device)
    forward = computation(loss, call)
    gradient = functools.partial(torch.autograd.grad, inputs=call.pred)

    def both() -> tuple[Tensor, ...]:
        return gradient(forward())

    if part == "both" and loss.startswith("ours"):
        _check(call, forward)
    if part == "forward":
        measure(benchmark, forward, device, rounds)
    elif part == "backward":
        measure(benchmark, gradient, device, rounds, setup=forward)
    else:
        measure(benchmark, both, device, rounds)
        # A compiled function must not be traced again under the mode that counts on the CPU.
        if device.type == "cuda" or "compile" not in loss:
            benchmark.extra_info["peak_bytes"] = peak_memory(both, device)
    describe(benchmark, case, loss, part, device)


def test_copy(benchmark, device, rounds, case):
    call = tensors(case, device)
    destination = torch.empty_like(call.pred).fill_(1)
    with torch.no_grad():
        measure(benchmark, lambda: destination.copy_(call.target), device, rounds)
    describe(benchmark, case, "copy", "both", device, moved=2 * case.bytes_of_pred)


def test_floor(benchmark, device, rounds, case):
    call = tensors(case, device)
    with torch.no_grad():
        if case.prior:
            measure(benchmark, lambda: torch.addcmul(call.pred, call.target, call.prior), device, rounds)
        else:
            measure(benchmark, lambda: torch.add(call.pred, call.target), device, rounds)
    describe(benchmark, case, "floor", "both", device)


def _check(call: Call, forward: Callable[[], Tensor]) -> None:
    """No time is worth anything of a wrong result: against the recipe that means the same."""
    recipe = RECIPES[f"{BEST} + prior" if call.prior is not None else BEST]
    expected = recipe(call.pred, call.target, call.mask, call.prior)
    result = forward()
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=0)
    (got,), (want,) = (torch.autograd.grad(x, call.pred) for x in (result, expected))
    # Eager recipes round the gradients of target and prior to pred's dtype one by one before they add them.
    precision = 1e-4 if got.dtype == FP32 else 1e-2
    torch.testing.assert_close(got, want, rtol=precision, atol=precision * want.abs().max().item())


def measure(benchmark: Any, work: Any, device: torch.device, rounds: int, setup: Any = None) -> None:
    """pytest-benchmark takes the time at the host. On CUDA the report uses `device_seconds`: events, cold second-level cache."""
    if device.type == "cuda":
        times = seconds(work, device, rounds, setup)
        benchmark.extra_info["device_seconds"] = statistics.median(times)
        flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def prepare() -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = () if setup is None else (setup(),)
        if device.type == "cuda":
            flush.zero_()
            torch.cuda.synchronize(device)
        return arguments, {}

    def timed(*arguments: Any) -> None:
        work(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(timed, setup=prepare, rounds=rounds, warmup_rounds=2)


def describe(benchmark: Any, case: Case, loss: str, part: str, device: torch.device, moved: int | None = None) -> None:
    """What the report needs to know of a row. `floor_bytes`: what a loss with a gradient cannot but move."""
    mask = 0 if case.mask == "none" else torch.Size(case.shape).numel() // case.shape[1] * 4
    tensors_moved = 4 if case.prior else 3
    names = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
    benchmark.group = case.name
    benchmark.extra_info.update(
        case=case.name,
        latents=names["latents"],
        dtype=short(case.dtype),
        mask=case.mask,
        prior=case.prior,
        loss=loss,
        part=part,
        device_type=device.type,
        bytes_of_pred=case.bytes_of_pred,
        floor_bytes=moved or tensors_moved * case.bytes_of_pred + mask,
    )
