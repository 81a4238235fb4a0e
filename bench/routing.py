"""What routing costs in quality and saves in work, on the demo's photographs: a LoRA of a real WAN transformer, tiny, learned with
some of the tokens, and measured with all of them.

    python -m bench.routing                      # five seeds of the small model: 144 tokens, 96 channels, 4 of 6 blocks routed
    python -m bench.routing --model large        # 1,024 tokens, 192 channels, 4 of 6 blocks routed
    python -m bench.routing --report             # the table and the curves of what is in the CSV

Every arm of a seed starts from the same base model and LoRA and sees the same batches, noise and times; the arms take turns step by
step, so that a busy machine slows them alike. Rows go to bench/results/<device>/routing.csv, seed by seed; what this commit
measured is not run again.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import plots
from bench.environment import ROOT, device_name, environment, slug
from masked_loss_triton import FlowTarget, MaskedLossConfig
from masked_loss_triton.demo import dataset, model, photos, tuning
from masked_loss_triton.demo.evaluation import Scores, Test
from masked_loss_triton.integration.musubi.routing.cross_attention import CrossAttentionGate
from masked_loss_triton.routing import routed
from masked_loss_triton.routing.diffusers import layout_of


@dataclasses.dataclass(frozen=True)
class Size:
    """One model and its data: pixels of a side, changes to the demo's model, pictures in a batch, steps of base and LoRA, how
    often the LoRA is measured."""

    side: int
    model: dict[str, Any]
    batch: int
    base_steps: int
    steps: int
    checkpoints: int


SIZES = {
    "small": Size(192, {"num_layers": 6, "patch_size": (1, 2, 2)}, 6, 300, 120, 4),
    "large": Size(
        512, {"num_layers": 6, "patch_size": (1, 2, 2), "attention_head_dim": 48, "ffn_dim": 768}, 2, 60, 60, 4
    ),
}


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train. `longer` multiplies the steps by what routing saves, so that it does as much work as the unrouted arm;
    `gated` weights what cross-attention hears in the text with the mask."""

    keep: float = 1.0
    until: float = 1.0
    prior: bool = False
    longer: bool = False
    gated: bool = False

    @property
    def name(self) -> str:
        parts = [f"keep {self.keep:g}"] + ([f"until {self.until:g}"] if self.until != 1 else [])
        return ", ".join(parts + ["prior"] * self.prior + ["equal work"] * self.longer + ["gated text"] * self.gated)


BASE = "base model"
KEEPS = (1.0, 0.75, 0.5, 0.25)
ARMS = (
    *(Arm(keep) for keep in KEEPS),
    *(Arm(keep, until=0.75) for keep in KEEPS[2:]),
    *(Arm(keep, longer=True) for keep in KEEPS[1:]),
    *(Arm(keep, prior=True) for keep in KEEPS),
    Arm(0.5, until=0.75, prior=True),
    Arm(0.5, prior=True, longer=True),
    Arm(gated=True),
)


class Trainee:
    """A LoRA in training in one way."""

    def __init__(self, arm: Arm, base: Any, subjects: tuning.Examples, size: Size, seed: int, per_step: float) -> None:
        self.arm, self.subjects, self.seed = arm, subjects, seed
        self.steps = round(size.steps / per_step) if arm.longer else size.steps
        self.model = model.with_lora(base, seed).train()
        self.parameters = [value for value in self.model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=tuning.LORA_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.draws = tuning.draws(subjects, self.steps, seed)
        self.step, self.seconds = 0, 0.0
        self.gate = CrossAttentionGate(layout_of(self.model)) if arm.gated else None

    def advance(self) -> None:
        start = time.process_time()
        for group in self.optimizer.param_groups:
            group["lr"] = tuning.LORA_LEARNING_RATE * tuning.rate_at(self.step, self.steps)
        self.loss(next(self.draws)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.process_time() - start

    def loss(self, draw: tuning.Draw) -> torch.Tensor:
        index, noise, level = draw.index, draw.noise, draw.time
        assert self.subjects.masks is not None
        latents, mask = self.subjects.latents[index], self.subjects.masks[index].unsqueeze(2)
        text = self.subjects.text[index, draw.caption]
        noisy = tuning.noisy_latents(latents, noise, level)
        prior = tuning.teacher(self.model, noisy, level, text) if self.arm.prior else None
        keep = self.arm.keep if self.step < self.arm.until * self.steps else 1.0
        config = MaskedLossConfig(prior_weight=1.0)
        chosen = {"config": config, "has_prior": self.arm.prior, "seed": self.seed, "step": self.step}
        with routed(self.model, mask, keep, **chosen) as weights:
            if self.gate is not None:
                self.gate.plan(mask, config, tuple(mask.shape[2:]), weights)
            pred = model.predict(self.model, noisy, level, text)
        return weights.loss(pred, FlowTarget(noise, latents), prior=prior, backend="torch")

    def operations(self, draw: tuning.Draw) -> int:
        """Floating point operations of forward and backward."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self.loss(draw).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def run(name: str, seed: int, arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """Some arms of one seed: a row for each arm and checkpoint, after one of the base model. Work is counted against the same step
    with all tokens."""
    size, device = SIZES[name], torch.device("cpu")
    model.MODEL_CONFIG.update(size.model)
    tuning.BATCH = size.batch
    with tempfile.TemporaryDirectory() as folder:
        dataset.make_dataset(photos.shipped_photos(), Path(folder), size.side, print)
        subjects = dataset.read_caches(Path(folder), device)
    base = model.build_model(seed, device)
    tuning.train_base(
        base, tuning.place_examples(size.side, device), size.base_steps, seed, "torch", lambda step, loss: None
    )
    test = Test(base.eval(), subjects)
    draw = next(tuning.draws(subjects, 1, seed))
    needed = {*arms, *(Arm(prior=arm.prior) for arm in arms)}
    counts = {arm: Trainee(arm, base, subjects, size, seed, 1.0).operations(draw) for arm in needed}
    work = {arm: arm.until * counts[arm] / counts[Arm(prior=arm.prior)] + 1 - arm.until for arm in arms}
    trainees = [Trainee(arm, base, subjects, size, seed, work[arm]) for arm in arms]
    rows = [_row(name, seed, BASE, 0, 0, 0.0, 0.0, test.score(base))]
    for round_ in range(1, max(trainee.steps for trainee in trainees) + 1):
        for trainee in trainees:
            if round_ > trainee.steps:
                continue
            trainee.advance()
            if not _is_checkpoint(round_, trainee.steps, size.checkpoints):
                continue
            scores = test.score(trainee.model.eval())
            trainee.model.train()
            arm = trainee.arm
            rows.append(_row(name, seed, arm.name, round_, trainee.steps, work[arm], trainee.seconds, scores))
    return rows


def _is_checkpoint(step: int, steps: int, checkpoints: int) -> bool:
    return step in {round(steps * part / checkpoints) for part in range(1, checkpoints + 1)}


def _row(
    name: str, seed: int, arm: str, step: int, steps: int, work: float, seconds: float, scores: Scores
) -> dict[str, Any]:
    row = {
        "model": name,
        "seed": seed,
        "arm": arm,
        "step": step,
        "steps": steps,
        "work_per_step": round(work, 4),
        "cpu_seconds": round(seconds, 2),
        "inside": round(scores.inside, 5),
        "outside": round(scores.outside, 5),
        "drift_outside": round(scores.drift_outside, 5),
    }
    print(*row.values(), flush=True)
    return {**row, **environment()}


def report(rows: list[dict[str, str]]) -> str:
    """The last checkpoints as a table: means over seeds, and the difference to all tokens, paired by seed, with its standard
    error."""
    lines = []
    for name in SIZES:
        last = {(row["arm"], row["seed"]): row for row in rows if row["model"] == name and row["step"] == row["steps"]}
        arms = list(dict.fromkeys(arm for arm, _ in last))
        if arms:
            lines += [
                f"\n{name} model, {len({seed for _, seed in last})} seeds\n",
                "| arm | work per step | time per step | error inside | against all tokens | error outside | drift outside | "
                "against all tokens |",
                "|---" * 8 + "|",
                *(_line(last, arm) for arm in arms),
            ]
    return "\n".join(lines)


def _line(last: dict[tuple[str, str], dict[str, str]], arm: str) -> str:
    reference = "keep 1, prior" if "prior" in arm else "keep 1"
    mine = [row for (name, _), row in last.items() if name == arm]
    pairs = [(row, last[reference, row["seed"]]) for row in mine if (reference, row["seed"]) in last]
    cells = [arm, "", ""]
    if arm != BASE:
        paces = [(float(row["cpu_seconds"]) / int(row["steps"]) for row in pair) for pair in pairs]
        pace = sum(own / other for own, other in paces) / len(pairs)
        cells = [arm, f"{float(mine[0]['work_per_step']):.2f}", f"{pace:.2f}"]
    for field, paired in (("inside", True), ("outside", False), ("drift_outside", True)):
        cells.append(f"{sum(float(one[field]) for one in mine) / len(mine):.3f}")
        if paired:
            alone = arm in (BASE, reference)
            cells.append("" if alone else _difference([float(a[field]) - float(b[field]) for a, b in pairs]))
    return "| " + " | ".join(cells) + " |"


def latest(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of each model and seed that the last commit measured: only these can be paired."""
    commits = {(row["model"], row["seed"]): row["commit"] for row in rows}
    return [row for row in rows if row["commit"] == commits[row["model"], row["seed"]]]


def _difference(values: list[float]) -> str:
    numbers = torch.tensor(values, dtype=torch.float64)
    error = float(numbers.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
    return f"{float(numbers.mean()):+.3f} ± {error:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--arms", nargs="+", help='only these, by name: "keep 0.5"')
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.output or ROOT / "bench/results" / slug(device_name()) / "routing.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    here = environment()["commit"]
    done = {(row["model"], int(row["seed"]), row["arm"]) for row in rows if row["commit"] == here}
    chosen = [arm for arm in ARMS if args.arms is None or arm.name in args.arms]
    for seed in () if args.report else args.seeds:
        missing = [arm for arm in chosen if (args.model, seed, arm.name) not in done]
        if not missing:
            continue
        found = [row for row in run(args.model, seed, missing) if (args.model, seed, row["arm"]) not in done]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(found[0]))
            if not rows:
                writer.writeheader()
            writer.writerows(found)
        rows += [{name: str(value) for name, value in row.items()} for row in found]
    if rows:
        print(report(latest(rows)), *plots.routing(latest(rows), path.parent), sep="\n")


if __name__ == "__main__":
    main()
