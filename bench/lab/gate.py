"""cuxray's gate over the kernels: no spills, no stack, registers within the budget, no unexplained uncoalesced access.

    python -m bench.lab.gate                       # every variant, every CUDA target; exit status 1 when something is violated

cuxray (PyPI) analyses the machine code and needs no GPU. It fetches nothing here: its tools are those of the Triton wheel.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import linecache
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

from bench.cases import build
from bench.lab.budgets import REGISTERS
from bench.lab.launches import DEVICES, launches_of
from bench.lab.machine_code import NVIDIA_TOOLS, analyse, tensor_at, tool, with_true_lines
from bench.lab.variants import VARIANTS

CUDA_TARGETS = [name for name in DEVICES if name.startswith("sm_")]

# Accesses that cuxray calls uncoalesced, by kernel and tensor, and why they stay.
EXPLAINED: dict[tuple[str, str], str] = {
    (
        "loss_kernel",
        "partials",
    ): "partial sums of the weights, a few KB that every program reads once, eight numbers by each thread",
    ("loss_kernel", "terms"): "the last program alone adds the partial losses, a few KB in all",
    ("loss_kernel", "values"): "the same, named by the line inside the helper",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """An access that wastes sectors."""

    unit: str
    kernel: str
    tensor: str
    file: str
    line: int
    efficiency: float  # percent of the sectors that are asked for
    stride: int | None  # bytes from thread to thread, None where cuxray cannot tell
    bits: int  # the narrowest access to the tensor

    @property
    def place(self) -> str:
        return f"{pathlib.Path(self.file).name}:{self.line}"

    @property
    def why(self) -> str | None:
        explained = EXPLAINED.get((self.kernel, self.tensor))
        if explained is None and self.stride is None and self.bits == 128 and self.efficiency < 50:
            return "cuxray does not know the step between threads, and 16 bytes by each are never less than half of a sector"
        if explained is None and self.tensor == self.place and "write_loss(" in linecache.getline(self.file, self.line):
            return EXPLAINED[self.kernel, "terms"]  # inlined: the compiler kept the line of the call alone
        return explained


def write_cubins(folder: pathlib.Path, variants: Iterable[str], targets: Iterable[str]) -> dict[str, dict[str, int]]:
    """Writes one cubin per distinct kernel, named after the first variant that needs it.

    Returns:
        Of each file, by tensor, the bits of the narrowest access.
    """
    seen: set[int] = set()
    widths: dict[str, dict[str, int]] = {}
    for variant in variants:
        call = build(VARIANTS[variant], filled=False)
        for target in targets:
            device = DEVICES[target]
            for launch in launches_of(call, device.hardware, stats=VARIANTS[variant].stats, backward=False):
                kernel = launch.compile(device.target)
                if id(kernel) not in seen:
                    seen.add(id(kernel))
                    cubin = folder / f"{variant.replace(' ', '_')}.{launch.name}.{target}.cubin"
                    _assemble(kernel.asm["ptx"], cubin)
                    code = analyse(kernel, device)
                    names = {*code.loads, *code.stores}
                    widths[cubin.name] = {
                        name: min({**code.loads.get(name, {}), **code.stores.get(name, {})}) for name in names
                    }
    return widths


def _assemble(ptx: str, cubin: pathlib.Path) -> None:
    """Assembles with the ptxas of CUDA 13, which Triton itself uses from sm_100 on: cuxray cannot follow what older ones write."""
    source = cubin.with_suffix(".ptx")
    source.write_text(with_true_lines(ptx))
    architecture = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert architecture is not None, "PTX without a target"
    tool("ptxas-blackwell", f"--gpu-name={architecture[1]}", "-lineinfo", str(source), "-o", str(cubin))
    source.unlink()


def budget() -> dict[str, Any]:
    """cuxray's budget file."""
    rules = [
        {"match": f"^{kernel}$", "gate": f"spill_instrs==0, stack==0, regs<={registers}"}
        for kernel, registers in REGISTERS.items()
    ]
    return {"default": "spill_instrs==0, stack==0", "kernels": rules}


def run_gate(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The violations of the budget."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(budget(), file)
        file.flush()
        return _cuxray("gate", str(folder), "--budget", file.name, "--json")["violations"]


def uncoalesced(folder: pathlib.Path, widths: dict[str, dict[str, int]]) -> list[Finding]:
    """What cuxray calls uncoalesced, with what `write_cubins` has returned."""
    findings = []
    for unit in _cuxray("report", str(folder), "--json")["units"]:
        for kernel in unit["kernels"]:
            for site in (kernel.get("access") or {}).get("by_site", []):
                if site["verdict"] == "uncoalesced":
                    tensor = tensor_at(site["file"], site["line"])
                    more = site.get("efficiency_pct") or 0.0, site.get("stride"), widths[unit["label"]].get(tensor, 0)
                    findings.append(Finding(unit["label"], kernel["name"], tensor, site["file"], site["line"], *more))
    return findings


def _cuxray(*arguments: str) -> dict[str, Any]:
    environment = os.environ | {"CUXRAY_NO_FETCH": "1", "CUXRAY_TOOLCHAIN": str(NVIDIA_TOOLS)}
    command = [sys.executable, "-m", "cuxray", *arguments]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode not in (0, 1) or not finished.stdout.strip():
        raise RuntimeError(f"cuxray failed with status {finished.returncode}: {finished.stderr.strip()}")
    return json.loads(finished.stdout)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lab.gate", description=__doc__.split("\n")[0])
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="may be repeated; default: all")
    parser.add_argument("--target", action="append", choices=CUDA_TARGETS, help="may be repeated; default: all")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        widths = write_cubins(folder, options.variant or VARIANTS, options.target or CUDA_TARGETS)
        violations = run_gate(folder)
        findings = uncoalesced(folder, widths)
    unexplained = sum(finding.why is None for finding in findings)
    print(
        f"{len(widths)} kernels, {len(violations)} violations of the budget, {unexplained} accesses without an explanation"
    )
    for violation in violations:
        print(f"  {violation['unit']}: {violation['reason']}")
    for finding in findings:
        why = finding.why or "NOT EXPLAINED"
        print(
            f"  {finding.unit}: {finding.tensor} at {finding.place}, {finding.efficiency:.0f}% of its sectors used: {why}"
        )
    return 1 if violations or unexplained else 0


if __name__ == "__main__":
    raise SystemExit(main())
