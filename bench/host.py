"""What one call of the loss costs the host: checks, autograd, allocation and Triton's launches, before any kernel runs.

    python -m bench.host

With a GPU the kernels are launched, and the queue is empty when a round starts. Without one Triton's own launchers call a driver
that does nothing (lab/null_driver.py): all but the driver is there. Tensors are small, so that nothing waits for data; on a CPU the
eager recipes compute on four elements. Rows are measured in turns, round by round; a ratio is the median of those of the rounds,
and holds where other work slows all of them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.cases import Call, Case, build
from bench.recipes import RECIPES
from masked_loss_triton import masked_loss
from masked_loss_triton.backend import replay

CASES = (Case(latents="16x1x26x38"), Case(latents="16x1x26x38", prior=True))
Work = Callable[[], Any]


def calls_of(work: Work) -> int:
    """Functions that `work` calls in Python and in C, a count that the load of a machine does not change."""
    count = 0

    def note(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    work(), work()  # what is done once
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count - 1  # the end of the counting


def in_turns(works: dict[str, Work], rounds: int, calls: int = 100) -> dict[str, list[float]]:
    """Microseconds per call of each work, in each round; without a GPU of this thread, with one by the clock."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.thread_time
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            if on_gpu:
                torch.cuda.synchronize()
            start = clock()
            for _ in range(calls):
                work()
            times[name].append((clock() - start) / calls * 1e6)
    return {name: values[1:] for name, values in times.items()}  # the first round warms up


def ours(call: Call) -> Work:
    """Forward of a form that was seen before."""
    return lambda: masked_loss(call.pred, call.target, call.mask, call.config, prior=call.prior, backend="triton")


def the_whole_way(call: Call) -> Work:
    """Forward as of a form that was never seen, but for what Triton and the plans have kept."""
    forward = ours(call)

    def work() -> Any:
        replay._recording.cache_clear()
        return forward()

    return work


def eager(name: str, call: Call) -> tuple[Work, torch.Tensor]:
    """(forward, pred) of a recipe; on a CPU of four elements."""
    pred, target, mask, prior = call.pred, call.target, call.mask, call.prior
    if pred.device.type == "cpu":
        corner = (..., slice(1), slice(2), slice(2))
        pred = pred.detach()[:, :1][corner].clone().requires_grad_()
        target, mask = target[:, :1][corner], mask[corner]  # type: ignore[index]
        prior = None if prior is None else prior[:, :1][corner]
    return lambda: RECIPES[name](pred, target, mask, prior), pred  # type: ignore[arg-type]


def of_case(case: Case, device: torch.device, rounds: int) -> list[dict[str, float | str]]:
    """A row for ours, ours the whole way, and each recipe: microseconds, function calls, and the time over the best recipe's."""
    call = build(case, device)
    forwards = {"ours": (ours(call), call.pred), "ours, first call": (the_whole_way(call), call.pred)}
    peers = [name for name, recipe in RECIPES.items() if recipe.takes_prior == case.prior]
    forwards |= {name: eager(name, call) for name in peers}

    def both(name: str) -> Work:
        forward, pred = forwards[name]
        return lambda: torch.autograd.grad(forward(), pred)

    times = in_turns({name: both(name) for name in forwards}, rounds)
    of_forward = in_turns({name: forward for name, (forward, _) in forwards.items()}, rounds)
    best = [min(values) for values in zip(*(times[name] for name in peers), strict=True)]
    return [
        {
            "case": case.name,
            "loss": name,
            "forward": statistics.median(of_forward[name]),
            "both": statistics.median(times[name]),
            "fastest": min(times[name]),
            "over best recipe": statistics.median(x / y for x, y in zip(times[name], best, strict=True)),
            "function calls": calls_of(both(name)),
        }
        for name in forwards
    ]


def report(rounds: int = 30) -> list[dict[str, float | str]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        from bench.lab import null_driver

        null_driver.install()
        torch.set_num_threads(1)
    return [row for case in CASES for row in of_case(case, device, rounds)]


def rows(full: bool) -> list[dict[str, float | str]]:
    """`report` in a process of its own: the driver that does nothing is there for good."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        return processes.submit(report).result()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="rounds of 100 calls (default: 30)")
    columns = ("forward", "both", "fastest", "over best recipe", "function calls")
    found = report(parser.parse_args(arguments).rounds)
    print(f"{'microseconds':<55}" + "".join(f"{column:>18}" for column in columns))
    for row in found:
        cells = [row[column] for column in columns]
        line = "".join(
            f"{cell:>18.2f}" if isinstance(cell, float) and cell < 10 else f"{cell:>18.0f}" for cell in cells
        )
        print(f"{row['case']:<24}{row['loss']:<31}{line}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
