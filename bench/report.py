"""`make bench`: runs the suites and tools of this folder and writes one folder of results: CSV, Markdown, plots.

    python -m bench.report                      # a few minutes on two CPU cores; on a machine with a GPU the CUDA numbers
    python -m bench.report --all                # every latent shape, every kernel variant: an hour
    python -m bench.report --output FOLDER --only time ledger
    python -m bench.report --busy               # where other work takes turns with it: processor time of one thread

Every row of every CSV says device, versions and commit.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch

from bench import plots
from bench.environment import ROOT, device_name, environment, slug
from bench.suites import Rows, timed

# Where the rows of each part come from: `rows(full)` of a module, which is imported when asked for. Where kernels are interpreted
# (TRITON_INTERPRET), the tools that look at launches refuse.
PARTS = {
    "host": "bench.host",
    "ledger": "bench.lab.ledger",
    "compiled": "bench.lab.compiled",
    "emulated": "bench.lab.emulate",
}


def write_csv(path: pathlib.Path, rows: Rows, about: dict[str, str]) -> None:
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *about], restval="")
        writer.writeheader()
        writer.writerows({**{name: _rounded(value) for name, value in row.items()}, **about} for row in rows)


def _rounded(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def markdown(rows: Rows, columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        lines.append(
            "| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
        )
    return "\n".join(lines)


def with_speed(rows: Rows) -> Rows:
    """The rows of part "both", each beside the best eager recipe and the floor of its case."""
    both = [row for row in rows if row["part"] == "both"]
    result = []
    for row in both:
        case = [other for other in both if other["case"] == row["case"]]
        best = min((other["milliseconds"] for other in case if plots.is_eager(other["loss"])), default=float("nan"))
        floor = next((other["milliseconds"] for other in case if other["loss"] == "floor"), float("nan"))
        ratios = {"best eager / this": best / row["milliseconds"], "this / floor": row["milliseconds"] / floor}
        result.append({**row, **ratios})
    cases = list(dict.fromkeys(row["case"] for row in both))
    return sorted(result, key=lambda row: (cases.index(row["case"]), row["milliseconds"]))


# Of each part that has a table in the report: its heading and columns, and which rows and plots it shows.
TABLES: dict[str, tuple[str, Sequence[str]]] = {
    "time": (
        "Forward and backward",
        ("case", "loss", "milliseconds", "best eager / this", "this / floor", "gb_per_s", "peak_n"),
    ),
    "host": (
        "Host time of a call (microseconds)",
        ("case", "loss", "forward", "both", "over best recipe", "function calls"),
    ),
    "ledger": (
        "Bytes, launches, synchronisations, memory (in units of pred)",
        ("name", "case", "bytes", "launches", "synchronisations", "peak", "executed"),
    ),
    "compiled": (
        "Compiled code (sm_90 and gfx942; compiled.csv has all targets)",
        (
            "variant",
            "kernel",
            "target",
            "registers",
            "spills",
            "local_bytes",
            "shared_bytes",
            "occupancy",
            "loads",
            "stores",
        ),
    ),
    "emulated": ("Executed on the emulator", ()),
    "other": ("Other suites (seconds)", ("name", "min", "median", "rounds")),
}
PLOTS = {"time": plots.time, "ledger": plots.traffic, "compiled": plots.registers}


def shown(part: str, rows: Rows) -> Rows:
    """The rows of a part that its table has."""
    if part == "time":
        return with_speed(rows)
    if part == "compiled":
        return [row for row in rows if row["target"] in ("sm_90", "gfx942")]
    return rows


def write_report(folder: pathlib.Path, results: dict[str, Rows], about: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pages = [f"# Results: {about['device']}", ", ".join(f"{name} {value}" for name, value in about.items())]
    for name, rows in results.items():
        write_csv(folder / f"{name}.csv", rows, about)
    for part, (heading, columns) in TABLES.items():
        if rows := results.get(part):
            pages += [f"## {heading}", markdown(shown(part, rows), columns or list(rows[0]))]
            pages += PLOTS[part](rows, folder) if part in PLOTS else []
    (folder / "report.md").write_text("\n\n".join(pages) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every shape and every kernel variant")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="for a machine that others use: one thread, and the processor time of the process instead of the clock's",
    )
    parser.add_argument("--only", nargs="+", choices=("time", *PARTS), default=("time", *PARTS), help="parts to run")
    parser.add_argument("--output", type=pathlib.Path, help="folder (default: bench/results/<device>)")
    options = parser.parse_args(arguments)
    if options.busy:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    folder = options.output or ROOT / "bench" / "results" / slug(device_name())
    results: dict[str, Rows] = {}
    if "time" in options.only:
        results["time"], results["other"] = timed(options.all, options.busy)
    for part in (part for part in PARTS if part in options.only):
        results[part] = importlib.import_module(PARTS[part]).rows(options.all)
    about = environment() | ({"clock": "processor time"} if options.busy else {"clock": "wall"})
    write_report(folder, results, about)
    print(f"results in {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
