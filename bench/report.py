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
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from bench import emulate, ledger, plots
from bench.cases import LARGE, MAIN, Case
from bench.environment import ROOT, device_name, environment, slug
from bench.variants import TARGETS, VARIANTS

PARTS = ("time", "host", "ledger", "compiled", "emulated")
Rows = list[dict[str, Any]]
FEW_VARIANTS = (
    "main", "main bf16", "main fp16", "prior", "prior bf16", "flow", "stages", "pixels uint8 bf16", "blur", "channels last",
    "26x38", "26x38 bf16", "42x24",
)  # fmt: skip


def timed(full: bool, busy: bool = False) -> tuple[Rows, Rows]:
    """(rows of the loss, rows of the other suites of this folder), from pytest-benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "benchmarks.json"
        suite = ROOT / "bench" / ("test_loss.py" if busy else "")
        command = [sys.executable, "-m", "pytest", str(suite), "-q", "-W", "default", "--benchmark-enable"]
        command += [
            f"--benchmark-json={file}",
            "--benchmark-columns=min,median,iqr,rounds",
            "--benchmark-group-by=group",
        ]
        command += ["--all-cases"] * full + ["--benchmark-timer=time.process_time", "--rounds=25"] * busy
        subprocess.run(command, cwd=ROOT, check=False, env=_plain_environment())
        if not file.exists():
            raise SystemExit("the benchmarks wrote no results: see the messages of pytest above")
        benchmarks = json.loads(file.read_text() or "{}").get("benchmarks", [])
    rows: Rows = []
    others: Rows = []
    for entry in benchmarks:
        stats = {name: entry["stats"][name] for name in ("min", "median", "iqr", "rounds")}
        if "loss" in entry["extra_info"]:
            rows.append(loss_row(entry["extra_info"], stats))
        else:
            others.append({"name": entry["name"], **stats, **entry["extra_info"]})
    return rows, others


def loss_row(info: dict[str, Any], stats: dict[str, Any]) -> dict[str, Any]:
    """One measurement. `gb_per_s`: the bytes that no loss can avoid, over its time."""
    time = info.get("device_seconds", stats["min"])
    return {
        "case": info["case"],
        "loss": info["loss"],
        "part": info["part"],
        "milliseconds": 1e3 * time,
        "host_median_milliseconds": 1e3 * stats["median"],
        "host_iqr_milliseconds": 1e3 * stats["iqr"],
        "rounds": stats["rounds"],
        "gb_per_s": info["floor_bytes"] / time / 1e9,
        "peak_n": info["peak_bytes"] / info["bytes_of_pred"] if "peak_bytes" in info else "",
        **{name: info[name] for name in ("latents", "dtype", "mask", "prior", "device_type")},
    }


def counted(full: bool) -> Rows:
    rows: Rows = []
    for latents in (MAIN, LARGE, "16x1x26x38") if full else (MAIN,):
        for dtype in ("fp32", "bf16"):
            for prior in (False, True):
                case = Case(latents=latents, dtype=ledger.DTYPES[dtype], prior=prior)
                entries = ledger.ledger(case, emulated=emulate.why_unavailable() is None and not prior)
                rows += [dataclasses.asdict(entry) for entry in entries]
    return [{name: "" if value is None else value for name, value in row.items()} for row in rows]


def compiled_rows(full: bool) -> Rows:
    from bench import compiled  # refuses to be imported where kernels are interpreted

    rows: Rows = []
    for row in compiled.report(VARIANTS if full else FEW_VARIANTS, TARGETS):
        plain = row.to_dict()
        plain["grid"] = "x".join(map(str, row.grid))
        plain["loads"] = compiled.widths(row.code.loads)
        plain["stores"] = compiled.widths(row.code.stores)
        rows.append(plain)
    return rows


def host_rows() -> Rows:
    from bench import host  # looks at launches, which there are none of where kernels are interpreted

    return host.report()


def emulated_rows() -> Rows:
    if reason := emulate.why_unavailable():
        print(f"no emulator, so no rows from executed code: {reason}")
        return []
    rows: Rows = []
    for result in emulate.report(list(emulate.CASES), full=False):
        full = {
            tensor: traffic.fullness for (kernel, tensor), traffic in result.traffic.items() if kernel == "loss_kernel"
        }
        mask = result.traffic.get(("weights_kernel", "mask"))
        rows.append(
            {
                "case": result.name,
                "launches": result.launches,
                "bytes_n": result.moved / result.bytes_of_pred,
                "distinct_bytes_n": result.distinct / result.bytes_of_pred,
                "loss_error": result.loss_error,
                "gradient_error_over_allowed": result.gradient_error,
                "instructions_per_element": result.instructions / result.elements,
                **{
                    f"sectors_full_{name}": full.get(name, "")
                    for name in ("pred", "target", "prior", "latents", "gradient")
                },
                "sectors_full_mask": mask.fullness if mask else "",
            }
        )
    return rows


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
    """Rows of part "both", each beside the best eager recipe and the floor of its case."""
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


def write_report(folder: pathlib.Path, results: dict[str, Rows], about: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pages = [f"# Results: {about['device']}", ", ".join(f"{name} {value}" for name, value in about.items())]
    for name, rows in results.items():
        write_csv(folder / f"{name}.csv", rows, about)
    if rows := results.get("time"):
        columns = ("case", "loss", "milliseconds", "best eager / this", "this / floor", "gb_per_s", "peak_n")
        pages += ["## Forward and backward", markdown(with_speed(rows), columns)]
        pages += plots.time(rows, folder)
    if rows := results.get("host"):
        columns = ("case", "loss", "forward", "both", "ours", "lookup", "driver")
        pages += ["## Host time of a call (microseconds)", markdown(rows, columns)]
    if rows := results.get("ledger"):
        columns = ("name", "case", "bytes", "launches", "synchronisations", "peak", "executed")
        pages += ["## Bytes, launches, synchronisations, memory (in units of pred)", markdown(rows, columns)]
        pages += plots.traffic(rows, folder)
    if rows := results.get("compiled"):
        columns = (
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
        )
        shown = [row for row in rows if row["target"] in ("sm_90", "gfx942") and row["kernel"] != "scale_kernel"]
        pages += ["## Compiled code (sm_90 and gfx942; compiled.csv has all targets)", markdown(shown, columns)]
        pages += plots.registers(rows, folder)
    if rows := results.get("emulated"):
        pages += ["## Executed on the emulator", markdown(rows, list(rows[0]))]
    if rows := results.get("other"):
        pages += ["## Other suites (seconds)", markdown(rows, ("name", "min", "median", "rounds"))]
    (folder / "report.md").write_text("\n\n".join(pages) + "\n")


def _plain_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every shape and every kernel variant")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="for a machine that others use: one thread, and the processor time of the process instead of the clock's",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--output", type=pathlib.Path, help="folder (default: bench/results/<device>)")
    options = parser.parse_args(arguments)
    if options.busy:
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
    folder = options.output or ROOT / "bench" / "results" / slug(device_name())
    results: dict[str, Rows] = {}
    if "time" in options.only:
        results["time"], results["other"] = timed(options.all, options.busy)
    if "host" in options.only:
        results["host"] = host_rows()
    if "ledger" in options.only:
        results["ledger"] = counted(options.all)
    if "compiled" in options.only:
        results["compiled"] = compiled_rows(options.all)
    if "emulated" in options.only:
        results["emulated"] = emulated_rows()
    about = environment() | ({"clock": "processor time"} if options.busy else {"clock": "wall"})
    write_report(folder, results, about)
    print(f"results in {folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
