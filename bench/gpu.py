"""`make gpu`: everything that only a GPU can show, into one folder of results.

    python -m bench.gpu [--output FOLDER] [--quick]

In this order, each in a process of its own, none stopping the next: the tests marked `gpu`; compute-sanitizer (memcheck, racecheck)
over one call of each kind, where it is installed; device times by CUDA graphs (`masked-loss bench`); host times; the profiler's
launches and times. The last line says what failed.
"""

from __future__ import annotations

import argparse
import pathlib
import shutil
import subprocess
import sys
import time

import torch

from bench.environment import ROOT, device_name, environment, slug

SHAPES = ("1x16x21x60x104", "1x16x33x90x160", "4x16x33x90x160", "1x16x1x166x166")
ONE_CALL = """
import torch
from masked_loss_triton import MaskedLossConfig, masked_loss
for config in (MaskedLossConfig(), MaskedLossConfig(gamma=0.7, blur_kernel_size=3)):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for _ in range(2):
            pred, target, prior = (torch.randn(2, 16, 3, 20, 26, device="cuda").to(dtype) for _ in range(3))
            mask = torch.rand(2, 3, 40, 52, device="cuda")
            loss, _ = masked_loss(pred.requires_grad_(), target, mask, config, prior=prior, return_stats=True)
            (loss * 2).backward()
torch.cuda.synchronize()
"""
PROFILE = """
import torch
from masked_loss_triton import masked_loss
pred, target = (torch.randn(1, 16, 21, 60, 104, device="cuda") for _ in range(2))
pred.requires_grad_()
mask = torch.rand(1, 21, 60, 104, device="cuda")
call = lambda: torch.autograd.grad(masked_loss(pred, target, mask), pred)
call(), call()
with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
    for _ in range(20):
        call()
    torch.cuda.synchronize()
print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=20))
"""


def steps(folder: pathlib.Path, quick: bool) -> dict[str, list[str]]:
    """The commands, by the name of the file that keeps what they print."""
    python = sys.executable
    shapes = [word for shape in SHAPES[: 1 if quick else None] for word in ("--shape", shape)]
    dtypes = ["--dtype", "float32", "--dtype", "bfloat16"]
    out = str(folder / "bench.json")
    found = {
        "tests": [
            python,
            "-m",
            "pytest",
            "-m",
            "gpu",
            "-W",
            "default",
            "-rs",
            *(["-k", "not two_streams"] if quick else []),
        ]
    }
    if tool := shutil.which("compute-sanitizer"):
        for check in ("memcheck", "racecheck"):
            found[check] = [tool, "--tool", check, "--error-exitcode", "1", python, "-c", ONE_CALL]
    found["times"] = [python, "-m", "masked_loss_triton", "bench", *shapes, *dtypes, "--output", out]
    found["host"] = [python, "-m", "bench.host", "--rounds", "10"]
    found["profile"] = [python, "-c", PROFILE]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, help="folder (default: bench/results/<device>)")
    parser.add_argument("--quick", action="store_true", help="one shape, and no thousand rounds of races")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("python -m bench.gpu: torch sees no CUDA or ROCm device here; nothing was run", file=sys.stderr)
        return 2
    folder = (options.output or ROOT / "bench" / "results" / slug(device_name())).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines, failed = [f"{name} {value}" for name, value in environment().items()], []
    for name, command in steps(folder, options.quick).items():
        start = time.monotonic()
        with (folder / f"{name}.txt").open("w") as file:
            status = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
        lines.append(
            f"{name}: {'passed' if status == 0 else f'exit status {status}'}, {time.monotonic() - start:.0f} s"
        )
        print(lines[-1], flush=True)
        failed += [name] * (status != 0)
    if shutil.which("compute-sanitizer") is None:
        lines.append("compute-sanitizer: not installed, not run")
    (folder / "gpu.txt").write_text("\n".join(lines) + "\n")
    print(f"results in {folder}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
