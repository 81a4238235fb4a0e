"""Compiled-code report: every kernel variant that matters, compiled for five GPUs with no GPU.

    python -m bench.compiled                          # all variants, all targets: a table
    python -m bench.compiled --variant main --target sm_90 --json -

Triton cross-compiles; the arguments are those that the launchers give for real latents (launches.py). What must hold is checked by
tests/kernels/test_compiled.py.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from bench.cases import Case, build
from bench.launches import DEVICES, Launch, launches_of
from bench.machine_code import MachineCode, analyse
from masked_loss_triton import MaskedLossConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_THRESHOLD = MaskedLossConfig(prior_threshold=0.5, per_sample=True)
_STAGES = MaskedLossConfig(gamma=0.7, min_weight=0.05, loss_type="huber")

# By what the variant is there for. "main": contiguous float32 with a mask on the grid of the latents, the case of the limits.
VARIANTS = {
    "main": Case(),
    "main bf16": Case(dtype=BF16),
    "bf16 pred, fp32 target": Case(dtype=BF16, target_dtype=FP32),
    "main fp16": Case(dtype=FP16),
    "prior": Case(prior=True),
    "prior bf16": Case(dtype=BF16, prior=True),
    "prior threshold": Case(prior=True, config=_THRESHOLD, batch=2),
    "flow": Case(dtype=BF16, target_dtype=BF16, flow=True),
    "flow and prior": Case(dtype=BF16, target_dtype=BF16, flow=True, prior=True),
    "stages": Case(config=_STAGES),
    "stats": Case(stats=True, prior=True),
    "no mask": Case(mask="none"),
    "one frame": Case(mask="one frame"),
    "pixels": Case(mask="pixels"),
    "pixels uint8 bf16": Case(mask="pixels uint8", dtype=BF16),
    "pixels bilinear": Case(mask="pixels", config=MaskedLossConfig(resample="bilinear")),
    "pixels bicubic": Case(mask="pixels", config=MaskedLossConfig(resample="bicubic")),
    "blur": Case(config=MaskedLossConfig(blur_kernel_size=5)),
    "channels last": Case(memory="channels last"),
    "channels last bf16": Case(memory="channels last", dtype=BF16),
    "layered": Case(memory="layered", latents="16x7x68x120"),
    "large": Case(latents="16x33x90x160"),
    "48 channels": Case(latents="48x31x44x80"),
    "image": Case(latents="16x1x116x208", batch=4),
    "26x38": Case(latents="16x1x26x38"),
    "26x38 bf16": Case(latents="16x1x26x38", dtype=BF16),
    "26x38 prior bf16": Case(latents="16x1x26x38", dtype=BF16, prior=True),
    "42x24": Case(latents="16x1x42x24"),
    "166x166 bf16": Case(latents="16x1x166x166", dtype=BF16),
}


@dataclasses.dataclass
class Row:
    variant: str
    case: str
    kernel: str
    target: str
    grid: tuple[int, ...]
    code: MachineCode

    def to_dict(self) -> dict[str, Any]:
        code = {field.name: getattr(self.code, field.name) for field in dataclasses.fields(self.code)}
        for name in ("loads", "stores"):
            code[name] = {tensor: dict(bits) for tensor, bits in code[name].items()}
        return {**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)[:-1]}, **code}


def report(variants: Iterable[str], targets: Iterable[str]) -> Iterator[Row]:
    """One row per kernel, variant and target; the same code reached from two variants comes twice."""
    for variant in variants:
        case = VARIANTS[variant]
        call = build(case, filled=False)
        for target in targets:
            device = DEVICES[target]
            for launch in launches_of(call, device.multiprocessors, stats=case.stats):
                yield Row(variant, case.name, launch.name, target, launch.grid, _analysed(launch, target))


_known: dict[int, MachineCode] = {}


def _analysed(launch: Launch, target: str) -> MachineCode:
    kernel = launch.compile(DEVICES[target].target)  # the same object for the same code
    if id(kernel) not in _known:
        _known[id(kernel)] = analyse(kernel, DEVICES[target])
    return _known[id(kernel)]


def widths(counts: dict[str, collections.Counter[int]]) -> str:
    """ "pred 128, mask 32+128": the widths in bits that occur for each tensor."""
    return ", ".join(f"{tensor} {'+'.join(map(str, sorted(bits)))}" for tensor, bits in sorted(counts.items()))


def table(rows: Iterable[Row]) -> str:
    """Markdown."""
    lines = [
        "| variant | kernel | target | registers | spills | local | shared | occupancy | instructions | loads | stores |"
    ]
    lines.append("|---|---|---|---:|---:|---:|---:|---:|---:|---|---|")
    for row in rows:
        code = row.code
        lines.append(
            f"| {row.variant} | {row.kernel} | {row.target} | {code.registers} | {code.spills} | {code.local_bytes} | "
            f"{code.shared_bytes} | {code.occupancy:.0%} | {code.instructions} | {widths(code.loads)} | {widths(code.stores)} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__.split("\n")[0])
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated; default: all")
    parser.add_argument("--target", action="append", choices=DEVICES, help="may be repeated; default: all")
    parser.add_argument("--kernel", help="only kernels of this name")
    parser.add_argument(
        "--json", metavar="FILE", help="write rows as JSON lines instead of a table; - is standard output"
    )
    options = parser.parse_args(arguments)
    rows = report(options.variant or VARIANTS, options.target or DEVICES)
    rows = (row for row in rows if options.kernel in (None, row.kernel))
    if options.json:
        with open(options.json, "w") if options.json != "-" else sys.stdout as out:
            for row in rows:
                out.write(json.dumps(row.to_dict()) + "\n")
    else:
        print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
