"""What one call of the loss costs the host: checks, autograd, allocation and Triton's dispatch, before any kernel runs.

    python -m bench.host

With a GPU the kernels are launched, and the queue is empty when a round starts. Without one, each launch is bound and looked up as
the JIT does, and dropped: what the driver takes is missing. Tensors are small, so that nothing waits for data; on a CPU the eager
recipes compute on four elements.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from bench.cases import Call, Case, build
from bench.lab.launches import DEVICES, multiprocessors
from bench.recipes import RECIPES
from masked_loss_triton import backend, masked_loss

CASES = (Case(latents="16x1x26x38"), Case(latents="16x1x26x38", prior=True))


def microseconds(work: Callable[[], Any], rounds: int, calls: int = 100) -> float:
    """Time until a call returns: the median over rounds of their mean, without the first round, which warms up."""
    times = []
    for _ in range(rounds + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times[1:]) * 1e6


def _dropped(self: JITFunction, *_: Any, **__: Any) -> None:
    """Does nothing, in place of `JITFunction.run`: no dispatch at all."""


@functools.cache
def _binder(kernel: JITFunction) -> tuple[Callable[..., Any], dict[Any, Any]]:
    backend = make_backend(DEVICES["sm_90"].target)
    return create_function_from_signature(kernel.signature, kernel.params, backend), {}


def _looked_up(self: JITFunction, *arguments: Any, grid: Any, warmup: bool = False, **keywords: Any) -> None:
    """Looks up a kernel, in place of `JITFunction.run`: what the JIT does to find the compiled kernel, and no launch."""
    bind, keys = _binder(self)
    _, specialization, options = bind(*arguments, **keywords, debug=False, instrumentation_mode="")
    compute_cache_key(keys, specialization, options)


def _backward(forward: Callable[[], torch.Tensor], call: Call) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(forward(), call.pred)


def of_ours(case: Case, device: torch.device, rounds: int) -> dict[str, float | str]:
    """One row, in microseconds: a call of `masked_loss` on the triton backend. Of "both" (forward and backward) our own code,
    autograd and the allocations take "ours", Triton's way to the compiled kernel "lookup", the launch itself "driver"."""
    call = build(case, device)

    def forward() -> torch.Tensor:
        return masked_loss(call.pred, call.target, call.mask, call.config, prior=call.prior, backend="triton")

    both = _backward(forward, call)
    with contextlib.ExitStack() as stack:
        if device.type == "cpu":  # where `choose` would refuse, and the launchers take another configuration
            stack.enter_context(mock.patch.object(backend, "choose", lambda name, pred: name))
            stack.enter_context(multiprocessors(DEVICES["sm_90"].multiprocessors))
        with mock.patch.object(JITFunction, "run", _dropped):
            ours_both = microseconds(both, rounds)
        with mock.patch.object(JITFunction, "run", _looked_up):
            found, found_both = microseconds(forward, rounds), microseconds(both, rounds)
        whole, whole_both, driver = found, found_both, "not called"
        if device.type == "cuda":
            whole, whole_both = microseconds(forward, rounds), microseconds(both, rounds)
            driver = whole_both - found_both
    return {
        "case": case.name,
        "loss": "ours, triton",
        "forward": whole,
        "both": whole_both,
        "ours": ours_both,
        "lookup": found_both - ours_both,
        "driver": driver,
    }


def of_peer(name: str, case: Case, device: torch.device, rounds: int) -> dict[str, float | str]:
    call = build(case, device)
    if device.type == "cpu":
        corner = (..., slice(1), slice(2), slice(2))
        pred = call.pred.detach()[:, :1][corner].clone().requires_grad_()
        tensors = [pred, call.target[:, :1][corner], call.mask[corner]]  # type: ignore[index]
        call = Call(*tensors, None if call.prior is None else call.prior[:, :1][corner], call.config, call.layout)

    def forward() -> torch.Tensor:
        return RECIPES[name](call.pred, call.target, call.mask, call.prior)  # type: ignore[arg-type]

    return {
        "case": case.name,
        "loss": name,
        "forward": microseconds(forward, rounds),
        "both": microseconds(_backward(forward, call), rounds),
    }


def report(rounds: int = 30) -> list[dict[str, float | str]]:
    """Ours and the eager recipes; see `of_ours` for the columns."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for case in CASES:
        peers = [name for name, recipe in RECIPES.items() if recipe.takes_prior == case.prior]
        rows += [of_ours(case, device, rounds), *(of_peer(name, case, device, rounds) for name in peers)]
    return rows


def rows(full: bool) -> list[dict[str, float | str]]:
    return report()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="rounds of 100 calls (default: 30)")
    columns = ("forward", "both", "ours", "lookup", "driver")
    found = report(parser.parse_args(arguments).rounds)
    print(f"{'microseconds':<55}" + "".join(f"{column:>11}" for column in columns))
    for row in found:
        cells = [row.get(column, "") for column in columns]
        line = "".join(f"{cell:>11}" if isinstance(cell, str) else f"{cell:>11.0f}" for cell in cells)
        print(f"{row['case']:<24}{row['loss']:<31}{line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
