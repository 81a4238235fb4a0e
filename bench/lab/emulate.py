"""Runs the compiled kernels, instruction by instruction, on a CPU: results against the float64 reference, bytes, sectors, bounds.

    TINYGRAD=/a/tinygrad/checkout python -m bench.lab.emulate [--all]

emulator/ executes what Triton compiles for gfx1100 and refuses any access outside the tensors. It counts bytes exactly and says how
full the 32-byte sectors of each access are; it has no clock. It runs about 10^5 elements a second, so long latents are shortened in
time unless --all is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from bench.cases import LATENTS, Call, Case, Latents, build
from bench.lab.emulator import why_unavailable
from bench.lab.emulator.memory import Traffic
from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.kernels.devices import Hardware

BF16, FP16 = torch.bfloat16, torch.float16
HARDWARE = Hardware(132)  # the multiprocessors of an H100: the launchers split small inputs by them
TARGET = GPUTarget("hip", "gfx1100", 32)

# Frames are cut so that each case stays below 400,000 elements: rows and planes keep their real alignment.
SHORT = {"16x21x60x104": 3, "16x33x90x160": 1, "16x7x68x120": 2}
# In loads from shared memory the emulator follows the addresses of lanes that are switched off, and a wild one ends it. Under a
# mask of bytes the last block of 512 positions has such lanes unless it is whole.
LATENTS.setdefault("16x1x32x48", Latents("Qwen-Image", "384x256", 16, 1, 32, 48))
CASES = {
    "26x38": Case(latents="16x1x26x38"),
    "42x24": Case(latents="16x1x42x24"),
    "21x60x104": Case(),
    "33x90x160": Case(latents="16x33x90x160"),
    "26x38 bf16": Case(latents="16x1x26x38", dtype=BF16),
    "42x24 bf16": Case(latents="16x1x42x24", dtype=BF16),
    "21x60x104 bf16": Case(dtype=BF16),
    "26x38 fp16": Case(latents="16x1x26x38", dtype=FP16),
    "26x38 bf16 pred, fp32 target": Case(latents="16x1x26x38", dtype=BF16, target_dtype=torch.float32),
    "26x38 prior": Case(latents="16x1x26x38", prior=True),
    "26x38 prior bf16": Case(latents="16x1x26x38", prior=True, dtype=BF16),
    "26x38 flow bf16": Case(latents="16x1x26x38", flow=True, dtype=BF16),
    "32x48 pixels uint8": Case(latents="16x1x32x48", mask="pixels uint8"),
    "21x60x104 one frame bf16": Case(mask="one frame", dtype=BF16),
    "21x60x104 pixels": Case(mask="pixels"),
    "26x38 blur": Case(latents="16x1x26x38", config=MaskedLossConfig(blur_kernel_size=5)),
    "26x38 stages": Case(
        latents="16x1x26x38",
        config=MaskedLossConfig(gamma=0.7, min_weight=0.05, loss_type="huber", per_sample=True),
        batch=2,
    ),
    "26x38 channels last": Case(latents="16x1x26x38", memory="channels last"),
    "7x68x120 layered": Case(latents="16x7x68x120", memory="layered"),
    "26x38 accumulated": Case(latents="16x1x26x38"),
    "26x38 fp16 scaled": Case(latents="16x1x26x38", dtype=FP16),
}
# What the loss is multiplied by before its backward, where it is not 1, as it was the step before.
UPSTREAM = {"26x38 accumulated": 0.3, "26x38 fp16 scaled": 2.0**16}


@dataclasses.dataclass
class Result:
    """One case on the emulator.

    Args:
        traffic: by kernel and tensor.
        distinct: bytes that the launches asked memory for at least once each: what cannot be saved by any cache.
        loss_error: relative; gradient_error: the largest of |gradient - truth| in units of the allowed error (see `run`).
    """

    name: str
    elements: int
    bytes_of_pred: int
    launches: int
    traffic: dict[tuple[str, str], Traffic]
    distinct: int
    loss_error: float
    gradient_error: float
    instructions: int

    @property
    def moved(self) -> int:
        return sum(traffic.loaded + traffic.stored for traffic in self.traffic.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, each tensor as "kernel.tensor"."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "traffic"}
        by_name = {f"{kernel}.{tensor}": traffic for (kernel, tensor), traffic in self.traffic.items()}
        plain["moved"] = {name: traffic.loaded + traffic.stored for name, traffic in by_name.items()}
        plain["fullness"] = {name: traffic.fullness for name, traffic in by_name.items()}
        return plain


def shortened(case: Case) -> Case:
    """The same case with fewer frames, if it would take minutes."""
    frames = SHORT.get(case.latents)
    if frames is None:
        return case
    full = LATENTS[case.latents]
    short = Latents(full.model, full.source, full.channels, frames, full.height, full.width)
    LATENTS.setdefault(short.name, short)
    return dataclasses.replace(case, latents=short.name)


def run(name: str, case: Case) -> Result:
    """Executes one forward and backward of a step whose grad_output was that of the step before."""
    from bench.lab.emulator import machine
    from bench.lab.launches import Launch, fused_loss, on, recorded
    from masked_loss_triton.kernels.upstream import last_grad_output

    call, upstream = build(case), UPSTREAM.get(name, 1.0)
    traffic: dict[tuple[str, str], Traffic] = {}
    distinct: dict[tuple[int, int], int] = {}
    instructions = 0

    def execute(launch: Launch) -> None:
        nonlocal instructions
        done = machine.run(launch.compile(TARGET), launch.grid, launch.passed(TARGET))
        instructions += done.instructions
        name = "backward" if launch.is_backward else launch.name
        for tensor, counted in done.traffic.items():
            traffic[name, tensor] = traffic.get((name, tensor), Traffic()) + counted
            storage = launch.tensors[tensor].untyped_storage().data_ptr()
            # Read by one kernel and by the next is counted twice: between two launches a cache may have lost it.
            place = len(launches), storage
            distinct[place] = max(counted.distinct, distinct.get(place, 0))

    with on(HARDWARE), recorded(execute) as launches, _poisoned_outputs():
        last_grad_output(call.pred.device, call.config).fill_(upstream)
        loss = fused_loss(call)
        loss.backward(torch.tensor(upstream))
    truth = build(case)
    expected, gradient, size = (upstream * x for x in _reference(truth))
    return Result(
        name=name,
        elements=call.pred.numel(),
        bytes_of_pred=case.bytes_of_pred,
        launches=len(launches),
        traffic=traffic,
        distinct=sum(distinct.values()),
        loss_error=abs(upstream * loss.item() - expected) / abs(expected),
        gradient_error=_gradient_error(call.pred.grad, gradient, size, case),
        instructions=instructions,
    )


def _reference(call: Call) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Loss, gradient and the sum of the magnitudes of the gradient's two terms, which may cancel, in float64."""
    pred = call.pred.detach().double().requires_grad_()

    def masked(config: MaskedLossConfig, **keywords: Any) -> torch.Tensor:
        return masked_loss(pred, call.target, call.mask, config, layout=call.layout, **keywords)

    loss = masked(call.config, **call.keywords)
    (gradient,) = torch.autograd.grad(loss, pred)
    if call.prior is None:
        return loss.item(), gradient, gradient.abs()
    without = call.config.replace(prior_weight=0.0)
    (of_target,) = torch.autograd.grad(masked(without, **call.keywords), pred)
    return loss.item(), gradient, of_target.abs() + (gradient - of_target).abs()


def _gradient_error(gradient: torch.Tensor, truth: torch.Tensor, size: torch.Tensor, case: Case) -> float:
    """The largest error over the allowed one.

    float32: 1e-6 of the size of the terms (4e-6 where gamma is not 1), from a hundredth of the mean gradient up, below which the
    error of subtracting two float32 numbers counts. Halves: one unit in the last place of the truth rounded once.
    """
    if case.dtype == torch.float32:
        allowed = 4e-6 if case.config.gamma != 1 else 1e-6
        scale = size.clamp(min=truth.abs().mean().item() / 100)
        return ((gradient.double() - truth).abs() / scale).max().item() / allowed
    rounded = truth.to(case.dtype)
    ulp = torch.finfo(case.dtype).eps * rounded.double().abs().clamp(min=torch.finfo(case.dtype).tiny)
    return ((gradient.double() - rounded.double()).abs() / ulp).max().item()


class _poisoned_outputs:
    """Makes `torch.empty` and `empty_like` give NaN inside, so that an element nobody wrote is seen."""

    def __enter__(self) -> None:
        self.originals = torch.empty, torch.empty_like

        def poisoned(make: Any) -> Any:
            def empty(*args: Any, **keywords: Any) -> torch.Tensor:
                tensor = make(*args, **keywords)
                return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

            return empty

        torch.empty, torch.empty_like = map(poisoned, self.originals)

    def __exit__(self, *_: Any) -> None:
        torch.empty, torch.empty_like = self.originals


def report(names: list[str], full: bool) -> Iterator[Result]:
    for name in names:
        yield run(name, CASES[name] if full else shortened(CASES[name]))


def table(results: Iterator[Result] | list[Result]) -> Iterator[str]:
    yield (
        "| case | launches | bytes / N | distinct bytes / N | loss error | gradient error / allowed | "
        "instructions / 1,000 elements | sectors full |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---|"
    for result in results:
        sectors = ", ".join(
            f"{kernel.removesuffix('_kernel')}.{tensor} {traffic.fullness:.2f}"
            for (kernel, tensor), traffic in result.traffic.items()
        )
        yield (
            f"| {result.name} | {result.launches} | {result.moved / result.bytes_of_pred:.3f} | "
            f"{result.distinct / result.bytes_of_pred:.3f} | {result.loss_error:.1e} | {result.gradient_error:.2f} | "
            f"{1000 * result.instructions / result.elements:.0f} | {sectors} |"
        )


def rows(full: bool) -> list[dict[str, Any]]:
    """Rows of the report: every case, shortened; none where there is no emulator, which is said."""
    if reason := why_unavailable():
        print(f"no emulator, so no rows from executed code: {reason}")
        return []
    found = []
    for result in report(list(CASES), full):
        fullness = {
            tensor: traffic.fullness for (kernel, tensor), traffic in result.traffic.items() if kernel == "loss_kernel"
        }
        mask = result.traffic.get(("weights_kernel", "mask"))
        found.append(
            {
                "case": result.name,
                "launches": result.launches,
                "bytes_n": result.moved / result.bytes_of_pred,
                "distinct_bytes_n": result.distinct / result.bytes_of_pred,
                "loss_error": result.loss_error,
                "gradient_error_over_allowed": result.gradient_error,
                "instructions_per_element": result.instructions / result.elements,
                **{
                    f"sectors_full_{name}": fullness.get(name, "")
                    for name in ("pred", "target", "prior", "latents", "gradient")
                },
                "sectors_full_mask": mask.fullness if mask else "",
            }
        )
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lab.emulate", description=__doc__.split("\n")[0])
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; default: every case")
    parser.add_argument("--all", action="store_true", help="all frames of the long latents (minutes)")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
    options = parser.parse_args(arguments)
    if reason := why_unavailable():
        print(f"no emulator: {reason}", file=sys.stderr)
        return 2
    results = report(options.case or list(CASES), options.all)
    for line in (json.dumps(result.to_dict()) for result in results) if options.json else table(results):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
