"""What a masked loss does to a LoRA, measured: pictures from noise, held-out frames, a watermark, two subjects in one picture.

    python -m bench.proof                   # five seeds, about ten minutes of one core each; what is there is not run again
    python -m bench.proof --seeds 7 8 9     # others
    python -m bench.proof --report          # the tables and pictures of what was measured

Rows go to bench/results/<device>/proof.csv as each LoRA is done. Models and pictures go to build/proof/<commit>/. Numbers are the
same in every run on one kind of processor.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.environment import ROOT, device_name, environment, slug
from bench.proof import data, report
from bench.proof.experiments import (
    CHECKPOINTS,
    DEFAULT,
    EXPERIMENTS,
    MASK,
    ONE_CAPTION,
    STEPS,
    STOPPED,
    Measure,
    trained,
)
from masked_loss_triton.demo import model, pipeline, tuning
from masked_loss_triton.demo.evaluation import Samples
from masked_loss_triton.demo.tuning import Way

COMPARED = [f"{name}_{unit}" for name in ("subject", "background", "empty") for unit in ("psnr", "ssim", "mse")]
FIELDS = ("inside", "outside", "drift_outside", *COMPARED)


class Run:
    """One seed: its base model, its folder, and the rows that are already there."""

    def __init__(self, seed: int, table: Table) -> None:
        self.seed, self.table = seed, table
        self.folder = table.models / f"seed{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.base = self._base()
        self.measures: dict[str, Measure] = {}

    def _base(self) -> Any:
        file = self.folder / "base.safetensors"
        if not file.exists():
            start = time.process_time()
            base = model.build_model(self.seed, data.CPU)
            places = tuning.place_examples(data.SIDE, data.CPU)
            tuning.train_base(base, places, pipeline.BASE_STEPS, self.seed, "torch", lambda step, loss: None)
            save_file(base.state_dict(), file)
            print(f"seed {self.seed}: base model, {time.process_time() - start:.0f} s of a processor", flush=True)
        base = model.build_model(self.seed, data.CPU)
        base.load_state_dict(load_file(file))
        return base.eval()

    def measure(self, experiment: str) -> Measure:
        if experiment not in self.measures:
            self.measures[experiment] = Measure(experiment, self.base)
            samples = self.measures[experiment].sampler
            if samples is not None:
                self._draw(experiment, "base", samples.judge(samples.base))
            self._row(experiment, "base", 0, self.measures[experiment].errors(self.base), 0.0)
        return self.measures[experiment]

    def train(self, experiment: str, way: Way) -> None:
        """Trains and measures one LoRA, unless it was."""
        if (self.seed, experiment, way.key, STEPS[experiment]) in self.table.done:
            return
        measure, steps = self.measure(experiment), STEPS[experiment]
        tuned, start = model.with_lora(self.base, self.seed), time.process_time()
        keep_states = experiment == "photographs" and way is MASK

        def after(step: int, _: float) -> None:
            if keep_states and step % (steps // CHECKPOINTS) == 0 and step < steps:
                save_file(_lora(tuned), self.folder / f"mask-{step}.safetensors")
                self._row(experiment, way.key, step, measure.errors(tuned), time.process_time() - start)

        tuning.tune(tuned, trained(experiment, way is ONE_CAPTION), way, steps, self.seed, "torch", after)
        seconds = time.process_time() - start
        save_file(_lora(tuned), self.folder / f"{experiment}-{way.key}.safetensors")
        numbers, samples = measure.all(tuned)
        self._draw(experiment, way.key, samples)
        self._row(experiment, way.key, steps, numbers, seconds)

    def stop_the_mask(self) -> None:
        """Measures the mask alone, stopped as soon as the inside is learned as well as with the default prior at its end."""
        rows = [row for row in self.table.rows if row["experiment"] == "photographs" and int(row["seed"]) == self.seed]
        if any(row["arm"] == STOPPED for row in rows):
            return
        goal = next(float(row["inside"]) for row in rows if row["arm"] == DEFAULT.key)
        path = sorted((int(row["step"]), float(row["inside"])) for row in rows if row["arm"] == MASK.key)
        step = next((step for step, inside in path if inside <= goal), path[-1][0])
        name = f"mask-{step}" if step < STEPS["photographs"] else f"photographs-{MASK.key}"
        stopped = model.with_lora(self.base, self.seed).eval()
        stopped.load_state_dict(load_file(self.folder / f"{name}.safetensors"), strict=False)
        numbers, samples = self.measure("photographs").all(stopped)
        self._draw("photographs", STOPPED, samples)
        self._row("photographs", STOPPED, step, numbers, 0.0)

    def _draw(self, experiment: str, arm: str, samples: Samples | None) -> None:
        if samples is not None:
            Image.fromarray(np.concatenate(list(samples.pictures))).save(self.folder / f"{experiment}-{arm}.png")

    def _row(self, experiment: str, arm: str, step: int, numbers: dict[str, float], seconds: float) -> None:
        if (self.seed, experiment, arm, step) in self.table.done:
            return
        row = {"seed": self.seed, "experiment": experiment, "arm": arm, "step": step}
        row |= {name: round(numbers[name], 6) if name in numbers else "" for name in (*FIELDS, "painted")}
        self.table.add(row | {"cpu_seconds": round(seconds, 1)})


class Table:
    """The rows of this commit, written as they come; to report, those of the commit that was measured last."""

    def __init__(self, file: Path, to_report: bool = False) -> None:
        self.file, self.here = file, environment()
        every = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
        self.is_new = not every
        if to_report and every:
            self.here["commit"] = every[-1]["commit"]
        self.rows: list[dict[str, Any]] = [row for row in every if row["commit"] == self.here["commit"]]

    @property
    def models(self) -> Path:
        """The folder of the models and pictures of these rows."""
        return ROOT / "build" / "proof" / self.here["commit"]

    @property
    def done(self) -> set[tuple[int, str, str, int]]:
        return {(int(row["seed"]), row["experiment"], row["arm"], int(row["step"])) for row in self.rows}

    def add(self, row: dict[str, Any]) -> None:
        row |= self.here
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if self.is_new:
                writer.writeheader()
            writer.writerow(row)
        self.is_new = False
        self.rows.append({name: str(value) for name, value in row.items()})
        shown = (row[name] for name in ("seed", "experiment", "arm", "step", *FIELDS[:4], "background_psnr", "painted"))
        print(*shown, f"{row['cpu_seconds']} s", flush=True)


def _lora(tuned: Any) -> dict[str, torch.Tensor]:
    return {name: value.contiguous() for name, value in tuned.state_dict().items() if "lora_" in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path, help="the CSV file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(args.output or ROOT / "bench/results" / slug(device_name()) / "proof.csv", args.report)
    for seed in () if args.report else args.seeds:
        run = Run(seed, table)
        for experiment in args.experiments:
            for way in EXPERIMENTS[experiment]:
                run.train(experiment, way)
        if "photographs" in args.experiments:
            run.stop_the_mask()
    report.write(table.rows, table.file.parent, table.models)


if __name__ == "__main__":
    main()
