"""Traffic ledger: bytes, launches, synchronisations and memory of forward and backward, ours and the recipes of the peers. No GPU.

    python -m bench.lab.ledger [--latents 16x21x60x104] [--dtype fp32] [--json]

The recipes and our torch backend are counted operation by operation on meta tensors (measures.py). Our triton backend is counted
from the launches that its launchers make: every tensor given to a kernel is read or written once by it. With TINYGRAD
set (emulate.py) the compiled code is also executed, on shortened latents, and its own accesses are counted beside that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from bench.cases import LARGE, LATENTS, MAIN, Call, Case, build
from bench.measures import Counting, Counts, distinct_bytes
from bench.recipes import RECIPES
from masked_loss_triton.backend import closed_form
from masked_loss_triton.call import describe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What the backward reads where grad_output is what the forward expected, before it returns. That it touches nothing else is seen
# on the emulator (tests/bench/test_emulate.py).
_OF_BACKWARD = ("grad_output", "expected")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of the ledger. Bytes and memory in units of N, the bytes of pred.

    launches: everything that starts on the device; kernels: those of them that are ours.
    executed: bytes that the compiled code asked for, re-reads from caches included; None where there is no emulator.
    """

    name: str
    case: str
    bytes: float
    launches: int
    kernels: int
    synchronisations: int
    peak: float
    executed: float | None = None


def count(work: Callable[[], torch.Tensor]) -> Counts:
    """Counts forward and backward. The upstream gradient is there: that `loss.backward()` makes one costs every loss alike."""
    with Counting() as counts:
        loss = work()
        with _disable_current_modes():
            upstream = torch.ones_like(loss)
        loss.backward(upstream)
    return counts


def of_recipe(name: str, case: Case) -> Counts:
    call = build(case, "meta", filled=False)
    recipe = RECIPES[name]
    prior = call.prior if recipe.takes_prior else None
    return count(lambda: recipe(call.pred, call.target, call.mask, prior))


def of_torch_backend(case: Case) -> Counts:
    """Counts the torch backend. Called below `masked_loss`, which asks about autocast, unknown to the meta device."""
    call = build(case, "meta", filled=False)
    inputs = describe(call.pred, call.target, call.mask, call.config, layout=call.layout, **call.keywords)
    return count(lambda: closed_form.loss(inputs, call.config, False)[0])


def of_kernels(case: Case) -> Counts:
    """Counts the triton backend, as on an H100."""
    from bench.lab import launches
    from masked_loss_triton.kernels.upstream import last_grad_output

    call: Call = build(case, "meta", filled=False)
    last_grad_output(call.pred.device, call.config)  # made once in a process
    with launches.on(launches.DEVICES["sm_90"].hardware), launches.recorded() as recorded:
        counts = count(lambda: launches.fused_loss(call, stats=case.stats))
    for launch in recorded:
        touched = _OF_BACKWARD if launch.is_backward else launch.tensors
        counts.bytes += sum(distinct_bytes(x) for name, x in launch.tensors.items() if name in touched)
        counts.launches += 1
        counts.operations.append(launch.name)
    return counts


def entry(name: str, case: Case, counts: Counts, executed: float | None = None) -> Entry:
    unit = case.bytes_of_pred
    return Entry(
        name=name,
        case=case.name,
        bytes=counts.bytes / unit,
        launches=counts.launches,
        kernels=sum(name.endswith("_kernel") for name in counts.operations),
        synchronisations=counts.synchronisations,
        peak=counts.peak / unit,
        executed=executed,
    )


def ledger(case: Case, emulated: bool = False) -> Iterator[Entry]:
    """Entries of every recipe that takes what the case has, then ours."""
    for name, recipe in RECIPES.items():
        if recipe.takes_prior == case.prior:
            yield entry(name, case, of_recipe(name, case))
    yield entry("ours, without Triton", case, of_torch_backend(case))
    executed = None
    if emulated:
        from bench.lab.emulate import run, shortened

        short = shortened(case)
        executed = run(case.name, short).moved / short.bytes_of_pred
    yield entry("ours, triton backend", case, of_kernels(case), executed)
    if not case.flow:
        with_flow = dataclasses.replace(case, flow=True, target_dtype=torch.bfloat16)
        yield entry("ours, triton, FlowTarget of bf16", with_flow, of_kernels(with_flow))


def table(entries: list[Entry]) -> str:
    lines = ["| loss | case | bytes / N | launches | synchronisations | peak / N | executed / N |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for line in entries:
        executed = "" if line.executed is None else f"{line.executed:.3f}"
        numbers = f"{line.bytes:.3f} | {line.launches} | {line.synchronisations} | {line.peak:.3f}"
        lines.append(f"| {line.name} | {line.case} | {numbers} | {executed} |")
    return "\n".join(lines)


def rows(full: bool) -> list[dict[str, Any]]:
    """Rows of the report: the entries of the usual cases, or of more."""
    from bench.lab.emulate import why_unavailable

    entries: list[Entry] = []
    for latents in (MAIN, LARGE, "16x1x26x38") if full else (MAIN,):
        for dtype in ("fp32", "bf16"):
            for prior in (False, True):
                case = Case(latents=latents, dtype=DTYPES[dtype], prior=prior)
                entries += ledger(case, emulated=why_unavailable() is None and not prior)
    plain = map(dataclasses.asdict, entries)
    return [{name: "" if value is None else value for name, value in entry.items()} for entry in plain]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lab.ledger", description=__doc__.split("\n")[0])
    parser.add_argument("--latents", choices=LATENTS, action="append", help=f"may be repeated; default: {MAIN}")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--mask", default="latent", help="see bench/cases.py")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    from bench.lab.emulate import why_unavailable

    entries: list[Entry] = []
    for latents in options.latents or [MAIN]:
        for prior in (False, True):
            case = Case(latents=latents, dtype=DTYPES[options.dtype], mask=options.mask, prior=prior)
            entries += ledger(case, emulated=why_unavailable() is None)
    print(json.dumps([dataclasses.asdict(line) for line in entries]) if options.json else table(entries))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
