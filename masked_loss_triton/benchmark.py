"""What the loss costs on the machine at hand, beside the same formula in eager torch: for `masked-loss bench`."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from masked_loss_triton.backend import choose, why_no_kernels
from masked_loss_triton.loss import masked_loss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLUSH = 256 * 2**20  # bytes, more than a second-level cache holds: inputs then come from memory, as after a model


@dataclasses.dataclass(frozen=True)
class Row:
    """One loss at one shape, forward and backward.

    Args:
        milliseconds: median of the rounds; on a GPU of the device alone (a graph replayed, caches cold), on a CPU by the clock.
        times_eager: how many times as fast as eager torch, the median of the ratios of the rounds.
        host_microseconds: until the calls have returned; None on a CPU, where they return when they are done.
        peak_n: most memory beside the inputs, in units of pred; None on a CPU.
    """

    shape: tuple[int, ...]
    dtype: str
    loss: str
    milliseconds: float
    times_eager: float
    host_microseconds: float | None
    peak_n: float | None


def eager(pred: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the squared error as trainers write it in eager torch."""
    error = torch.nn.functional.mse_loss(pred.float(), target.float(), reduction="none")
    weight = mask.expand_as(error)
    return (error * weight).sum() / (weight.sum() + 1e-8)


def measure(shape: tuple[int, ...], dtype: str, device: torch.device, rounds: int) -> list[Row]:
    """A row of this library and one of eager torch, measured in turns."""
    # Events, graphs and counts of memory are those of the current device, which need not be this one.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return _measure(shape, dtype, device, rounds)


def _measure(shape: tuple[int, ...], dtype: str, device: torch.device, rounds: int) -> list[Row]:
    pred, target = (torch.randn(shape, device=device).to(DTYPES[dtype]) for _ in range(2))
    pred.requires_grad_()
    mask = torch.rand(shape[0], 1, *shape[2:], device=device)
    losses: dict[str, Callable[..., torch.Tensor]] = {"masked_loss": masked_loss, "eager torch": eager}
    works = {name: _both(function, pred, target, mask) for name, function in losses.items()}
    timed = {name: _timer(work, device) for name, work in works.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, seconds in timed.items():
            times[name].append(seconds())
    rows = []
    for name, work in works.items():
        ratios = [base / own for base, own in zip(times["eager torch"], times[name], strict=True)]
        on_gpu = device.type == "cuda"
        rows.append(
            Row(
                shape,
                dtype,
                name,
                1e3 * statistics.median(times[name]),
                statistics.median(ratios),
                _host_microseconds(work) if on_gpu else None,
                _peak(work) / (pred.numel() * pred.element_size()) if on_gpu else None,
            )
        )
    return rows


def about(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on: device, versions, backend."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{_processor()}, {torch.get_num_threads()} threads"
    triton: str | None = None
    if why_no_kernels() is None:
        import triton as module

        triton = module.__version__
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton}
    return {"device": name, "backend": choose("auto", torch.empty(0, device=device)), **versions}


def table(rows: list[Row]) -> str:
    """The rows as lines of text."""
    lines = [f"{'shape':<24}{'dtype':<10}{'loss':<13}{'ms':>9}{'x eager':>9}{'host us':>9}{'memory':>9}"]
    for row in rows:
        host = "" if row.host_microseconds is None else f"{row.host_microseconds:.0f}"
        peak = "" if row.peak_n is None else f"{row.peak_n:.2f} N"
        numbers = f"{row.milliseconds:>9.3f}{row.times_eager:>9.2f}{host:>9}{peak:>9}"
        lines.append(f"{'x'.join(map(str, row.shape)):<24}{row.dtype:<10}{row.loss:<13}{numbers}")
    return "\n".join(lines)


def _both(function: Callable[..., torch.Tensor], pred: torch.Tensor, *others: torch.Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(function(pred, *others), pred)


def _timer(work: Callable[[], Any], device: torch.device) -> Callable[[], float]:
    """A function that runs the work once and returns its seconds."""
    for _ in range(3):
        work()
    if device.type != "cuda":

        def by_clock() -> float:
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return by_clock
    # One launch of a graph: no gap between its kernels in which the device would wait for the host.
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = work()
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def by_graph() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        # Half a millisecond of the device, in which even a slow host queues what follows: no gap between the events.
        torch.cuda._sleep(1_000_000)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        assert kept is not None  # the graph writes into it
        return start.elapsed_time(end) / 1e3

    return by_graph


def _host_microseconds(work: Callable[[], Any], calls: int = 100) -> float:
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            work()
        times.append((time.perf_counter() - start) / calls)
    return 1e6 * statistics.median(times)


def _peak(work: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
