"""What a masked step costs beside a stock step, in the real trainer with tiny models on CPU.

    MUSUBI_REPO=... MUSUBI_LAB=... MUSUBI_FIXTURE=... python -m bench.trainer_overhead CACHES [--family wan]

CACHES is a folder with image/ and, for wan and hv, video/ of latent caches that carry masks; MUSUBI_LAB holds run_train.py,
which trains without a GPU. Stock and masked runs alternate; the time of a step is the median over all rounds, without the
first three steps of each. The models are some thousand times smaller than real ones, so the loss weighs more here than it
ever will in a training: this is an upper bound of its share.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HOOKS = Path(__file__).parents[1] / "tests" / "integration" / "musubi"
VARIANTS = {
    "stock": (),
    "masked": ("--use_mask_loss",),
    "masked, with prior": ("--use_mask_loss", "--inverted_mask_prior"),
}


def seconds(args: argparse.Namespace, variant: str, folder: str) -> list[float]:
    """The steps of one run."""
    result = Path(folder) / "run.json"
    command = [sys.executable, f"{os.environ['MUSUBI_LAB']}/run_train.py", args.family, str(args.steps)]
    command += ["--bs", "2", "--cache-root", str(args.caches.resolve()), "--json", str(result), *VARIANTS[variant]]
    hook = "lab_hook:launcher" if VARIANTS[variant] else ""
    environment = {**os.environ, "HOOK": hook, "MUSUBI_WORK": folder, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=HOOKS, env=environment, check=True, capture_output=True)
    return json.loads(result.read_text())["seconds"][3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", type=Path)
    parser.add_argument("--family", choices=("wan", "hv", "qwen"), default="wan")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for variant in VARIANTS:
                times[variant] += seconds(args, variant, folder)
    print(f"| {args.family} | median step, ms | quartiles, ms | share of stock |\n|---|---|---|---|")
    stock = statistics.median(times["stock"])
    for variant, measured in times.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(measured, n=4))
        print(f"| {variant} | {middle:.1f} | {low:.1f} to {high:.1f} | {middle / (1000 * stock):.2f} |")


if __name__ == "__main__":
    main()
