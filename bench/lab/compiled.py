"""Compiled-code report: every kernel variant that matters, compiled for five GPUs with no GPU.

    python -m bench.lab.compiled                          # all variants, all targets: a table
    python -m bench.lab.compiled --variant main --target sm_90 --json -

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

from bench.cases import build
from bench.lab.launches import DEVICES, Launch, launches_of
from bench.lab.machine_code import MachineCode, analyse
from bench.lab.variants import VARIANTS


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
            for launch in launches_of(call, device.hardware, stats=case.stats, backward=False):
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
    """A table in Markdown."""
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


FEW_VARIANTS = (
    "main", "main bf16", "main fp16", "prior", "prior bf16", "flow", "stages", "pixels uint8 bf16", "blur", "channels last",
    "26x38", "26x38 bf16", "42x24",
)  # fmt: skip


def rows(full: bool) -> list[dict[str, Any]]:
    """Rows of the report, on all targets."""
    plain = []
    for row in report(VARIANTS if full else FEW_VARIANTS, DEVICES):
        texts = dict(grid="x".join(map(str, row.grid)), loads=widths(row.code.loads), stores=widths(row.code.stores))
        plain.append(row.to_dict() | texts)
    return plain


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lab.compiled", description=__doc__.split("\n")[0])
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated; default: all")
    parser.add_argument("--target", action="append", choices=DEVICES, help="may be repeated; default: all")
    parser.add_argument("--kernel", help="only kernels of this name")
    parser.add_argument(
        "--json", metavar="FILE", help="write rows as JSON lines instead of a table; - is standard output"
    )
    options = parser.parse_args(arguments)
    found = report(options.variant or VARIANTS, options.target or DEVICES)
    found = (row for row in found if options.kernel in (None, row.kernel))
    if options.json:
        with open(options.json, "w") if options.json != "-" else sys.stdout as out:
            for row in found:
                out.write(json.dumps(row.to_dict()) + "\n")
    else:
        print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
