"""What a masked step costs beside a step without masks, in the real trainer, on your data, model and machine.

    python -m bench.trainer_overhead wan --musubi path/to/checkout --dataset_config dataset.toml --dit wan.safetensors ...

Everything after the family goes to the trainer, as in `masked-loss train`; give --max_train_steps 30 or so. The same command runs
without masks, with masks, with a prior, and with a prior on a quarter of the steps, in turns and in processes of their own. A
step lasts from one call of the model to the next; the trainer waits for its loss in between. Its first three steps are left
out. Where only some steps have a teacher, both kinds have a median, and the mean of the two is weighted by their shares.
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
    "masked, with prior on a quarter": ("--use_mask_loss", "--inverted_mask_prior", "--prior_probability", "0.25"),
}
QUARTER = 0.25
WARM_UP = 3
Step = tuple[float, bool]  # seconds, and whether the teacher ran


def timed(trainer: type, starts: list[Step]) -> type:
    """The trainer's class, noting when its model is called for the loss; the prior's teacher is part of a step."""
    taught = False

    class Timed(trainer):
        @functools.wraps(trainer.call_dit)  # its signature is checked before training
        def call_dit(self, *given: Any, **named: Any) -> Any:
            nonlocal taught
            output = super().call_dit(*given, **named)
            if torch.is_grad_enabled():
                starts.append((time.perf_counter(), taught))
            taught = not torch.is_grad_enabled()
            return output

    Timed.__name__, Timed.__module__ = trainer.__name__, trainer.__module__
    return Timed


def run_once(options: argparse.Namespace, arguments: list[str]) -> None:
    """Trains in this process and writes the lengths of the steps, seconds, to --times."""
    from masked_loss_triton.integration.musubi.launch import find_trainer, launch

    if options.prepare:
        module_name, _, function = options.prepare.partition(":")
        getattr(importlib.import_module(module_name), function)()
    starts: list[Step] = []
    module, trainer = find_trainer(options.family, options.musubi)
    setattr(module, trainer.__name__, timed(trainer, starts))
    launch(options.family, arguments)
    steps = [(after - before, taught) for (before, _), (after, taught) in itertools.pairwise(starts)]
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
    times: dict[str, list[Step]] = {variant: [] for variant in VARIANTS}
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
    print(f"| {options.family} | step, ms | quartiles, ms | of the step without masks |\n|---|---|---|---|")
    plain = typical(times["without masks"])
    for variant, steps in times.items():
        low, _, high = (1000 * value for value in statistics.quantiles([seconds for seconds, _ in steps], n=4))
        step = typical(steps)
        print(f"| {variant} | {1000 * step:.1f} | {low:.1f} to {high:.1f} | {step / plain:.2f} |")


def typical(steps: list[Step]) -> float:
    """The median step, seconds; where a quarter of the steps has a teacher, the mean of the two medians, so weighted."""
    kinds = [[seconds for seconds, taught in steps if taught == kind] for kind in (True, False)]
    medians = [statistics.median(kind) for kind in kinds if kind]
    return QUARTER * medians[0] + (1 - QUARTER) * medians[1] if len(medians) == 2 else medians[0]


if __name__ == "__main__":
    main()
