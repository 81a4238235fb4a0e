"""What a masked step costs beside a step without masks, in the real trainer, on your data, model and machine.

    python -m bench.trainer_overhead wan --musubi path/to/checkout --dataset_config dataset.toml --dit wan.safetensors ...

Everything after the family goes to the trainer, as in `masked-loss train`; give --max_train_steps 30 or so. The same command runs
without masks, with masks, and with a prior, in turns and in processes of their own. A step lasts from one call of the model to
the next; the trainer waits for its loss in between. Its first three steps are left out.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

VARIANTS = {
    "without masks": (),
    "masked": ("--use_mask_loss",),
    "masked, with prior": ("--use_mask_loss", "--inverted_mask_prior"),
}
WARM_UP = 3


def timed(trainer: type, starts: list[float]) -> type:
    """The trainer's class, noting when its model is called for the loss; the prior's teacher is part of a step."""

    class Timed(trainer):
        @functools.wraps(trainer.call_dit)  # its signature is checked before training
        def call_dit(self, *given: Any, **named: Any) -> Any:
            output = super().call_dit(*given, **named)
            if torch.is_grad_enabled():
                starts.append(time.perf_counter())
            return output

    Timed.__name__, Timed.__module__ = trainer.__name__, trainer.__module__
    return Timed


def run_once(options: argparse.Namespace, arguments: list[str]) -> None:
    """Trains in this process and writes the lengths of the steps, seconds, to --times."""
    from masked_loss_triton.integration.musubi.launch import find_trainer, launch

    if options.prepare:
        module_name, _, function = options.prepare.partition(":")
        getattr(importlib.import_module(module_name), function)()
    starts: list[float] = []
    module, trainer = find_trainer(options.family, options.musubi)
    setattr(module, trainer.__name__, timed(trainer, starts))
    launch(options.family, arguments)
    steps = [after - before for before, after in itertools.pairwise(starts)]
    Path(options.times).write_text(json.dumps(steps[WARM_UP:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.trainer_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("family", choices=("hv", "wan", "qwen"))
    parser.add_argument("--musubi", metavar="FOLDER", help="the trainer's checkout (default: the installed package)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (3)")
    parser.add_argument("--prepare", metavar="MODULE:FUNCTION", help="called first, for instance to make models tiny")
    parser.add_argument("--times", help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    if options.times:
        run_once(options, arguments)
        return
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "times.json"
        for _ in range(options.rounds):
            for variant, flags in VARIANTS.items():
                command = [
                    sys.executable,
                    "-m",
                    "bench.trainer_overhead",
                    *sys.argv[1:],
                    "--times",
                    str(result),
                    *flags,
                ]
                finished = subprocess.run(command, capture_output=True, text=True, check=False)
                if finished.returncode:
                    sys.exit(f"the run {variant!r} failed:\n{finished.stderr[-2000:]}")
                times[variant] += json.loads(result.read_text())
    print(f"| {options.family} | median step, ms | quartiles, ms | of the step without masks |\n|---|---|---|---|")
    plain = statistics.median(times["without masks"])
    for variant, measured in times.items():
        low, middle, high = (1000 * value for value in statistics.quantiles(measured, n=4))
        print(f"| {variant} | {middle:.1f} | {low:.1f} to {high:.1f} | {middle / (1000 * plain):.2f} |")


if __name__ == "__main__":
    main()
