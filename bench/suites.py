"""The rows of a report that pytest-benchmark measures: times of the loss and of the other suites of this folder."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from bench.environment import ROOT

Rows = list[dict[str, Any]]


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
        plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        subprocess.run(command, cwd=ROOT, check=False, env=plain)
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
