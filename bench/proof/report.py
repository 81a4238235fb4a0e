"""The tables, the claims and the pictures of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import plots
from bench.proof.experiments import (
    DEFAULT,
    DIAL,
    EXPERIMENTS,
    FLOOR,
    MASK,
    NO_MASK,
    ONE_CAPTION,
    STEPS,
    STOPPED,
    prior,
    trained,
)
from masked_loss_triton.demo import figures, photos, pipeline
from masked_loss_triton.demo.encoder import decode
from masked_loss_triton.demo.evaluation import SHOWN_PLACES

Rows = list[dict[str, Any]]
TITLES = {"base": "base model", STOPPED: "mask, stopped at the inside error of the prior"} | {
    way.key: way.title for ways in EXPERIMENTS.values() for way in ways
}
# Of each experiment: column, heading, digits.
COLUMNS: dict[str, list[tuple[str, str, int]]] = {
    "photographs": [
        ("inside", "error inside", 3),
        ("drift_outside", "drift outside", 3),
        ("subject_psnr", "subject, PSNR", 2),
        ("background_psnr", "background, PSNR", 2),
        ("background_ssim", "SSIM", 3),
        ("background_mse", "MSE", 4),
        ("empty_psnr", "nobody, PSNR", 2),
    ],
    "clip": [("inside", "error inside", 3), ("outside", "error outside", 3), ("drift_outside", "drift outside", 3)],
    "watermark": [("painted", "logo painted", 3), ("drift_outside", "drift on the logo", 3)],
    "pair": [("painted", "other painted", 3), ("background_psnr", "background, PSNR", 2)],
}


def final(rows: Rows) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """By experiment and arm, the rows at the end of training, by seed."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        arm, experiment = row["arm"], row["experiment"]
        if arm in ("base", STOPPED) or int(row["step"]) == STEPS[experiment]:
            found.setdefault((experiment, arm), {})[int(row["seed"])] = row
    return found


def table(rows: Rows, experiment: str) -> list[str]:
    """Means over seeds, and after a ± the standard error; in brackets the difference to no mask, paired by seed, with its own."""
    ends, columns = final(rows), COLUMNS[experiment]
    lines = ["| | " + " | ".join(title for _, title, _ in columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for (of, arm), mine in ends.items():
        if of != experiment:
            continue
        reference = ends.get((experiment, NO_MASK.key), {})
        cells = [_cell(mine, reference if arm not in ("base", NO_MASK.key) else {}, *column[::2]) for column in columns]
        lines.append(f"| {TITLES[arm]} | " + " | ".join(cells) + " |")
    return lines


def _cell(mine: dict[int, Any], reference: dict[int, Any], field: str, digits: int) -> str:
    values = {seed: float(row[field]) for seed, row in mine.items() if row[field] != ""}
    if not values:
        return ""
    text = f"{np.mean(list(values.values())):.{digits}f}"
    pairs = [value - float(reference[seed][field]) for seed, value in values.items() if seed in reference]
    if len(pairs) > 1:
        text += f" ({np.mean(pairs):+.{digits}f} ± {np.std(pairs, ddof=1) / len(pairs) ** 0.5:.{digits}f})"
    return text


Holds = Callable[[Callable[..., float]], bool]


def claims() -> list[tuple[str, Holds]]:
    """What is claimed, each with its baseline, for one seed: `value(arm, field, experiment)` gives its numbers."""
    key = DEFAULT.key
    others = (NO_MASK.key, MASK.key, FLOOR.key)
    return [
        (
            "The mask alone leaves the background of the photographs unlearned: its error outside is twice that of no mask.",
            lambda v: v(MASK.key, "outside") > 2 * v(NO_MASK.key, "outside"),
        ),
        (
            "Under the prior the outside drifts less than a fifth of what it drifts with the mask alone.",
            lambda v: v(key, "drift_outside") < v(MASK.key, "drift_outside") / 5,
        ),
        (
            "Under the prior the outside drifts less than a fifth of what it drifts without a mask.",
            lambda v: v(key, "drift_outside") < v(NO_MASK.key, "drift_outside") / 5,
        ),
        (
            "Stopped where its error inside is that of the prior, or at its end where it never gets there, the mask alone has "
            "drifted more than three times as far.",
            lambda v: v(STOPPED, "drift_outside") > 3 * v(key, "drift_outside"),
        ),
        (
            "Drawn from noise, the background is closer to the base model's with the prior than in any other way, by 3 dB or more.",
            lambda v: v(key, "background_psnr") > 3 + max(v(other, "background_psnr") for other in others),
        ),
        (
            "Prompts without the subject are changed less with the prior than in any other way.",
            lambda v: v(key, "empty_psnr") > max(v(other, "empty_psnr") for other in others),
        ),
        (
            "On frames of a clip that no training saw, the LoRA with the prior has less than half of the base model's error "
            "inside, and drifts less than half as far outside as with the mask alone.",
            lambda v: (
                v(key, "inside", "clip") < v("base", "inside", "clip") / 2
                and v(key, "drift_outside", "clip") < v(MASK.key, "drift_outside", "clip") / 2
            ),
        ),
        (
            "Subjects stand at new places because captions name several: with one caption a photograph, the background of the "
            "prompt is farther from the base model's.",
            lambda v: v(key, "background_psnr") > v(ONE_CAPTION.key, "background_psnr"),
        ),
        (
            "A logo on every picture is painted less than half as much with the mask of `static` and the prior as without a mask.",
            lambda v: v(key, "painted", "watermark") < v(NO_MASK.key, "painted", "watermark") / 2,
        ),
        (
            "Of two subjects in one picture, the other one is painted less than half as much with masks and the prior as without.",
            lambda v: v(key, "painted", "pair") < v(NO_MASK.key, "painted", "pair") / 2,
        ),
    ]


def judged(rows: Rows) -> list[str]:
    """Every claim with the number of seeds that it holds on."""
    ends = final(rows)
    seeds = sorted(set.intersection(*(set(ends.get((name, DEFAULT.key), {})) for name in EXPERIMENTS)))
    lines = []
    for text, holds in claims():
        yes = [
            seed
            for seed in seeds
            if holds(lambda arm, field, of="photographs", seed=seed: float(ends[of, arm][seed][field]))
        ]
        lines.append(f"- {len(yes)} of {len(seeds)}: {text}")
    return lines


def write(rows: Rows, folder: Path, models: Path) -> None:
    """Prints the tables and the claims, draws the chart into `folder`, and the pictures beside the models of each seed."""
    for experiment in EXPERIMENTS:
        print(f"\n{experiment}\n", *table(rows, experiment), sep="\n")
    print("\nseeds on which each claim holds\n", *judged(rows), sep="\n")
    if all(("photographs", way.key) in final(rows) for way in EXPERIMENTS["photographs"]):
        print(*plots.dial(dial(rows), folder), sep="\n")
    for seed in sorted(models.glob("seed*")):
        print(*pictures(seed, seed), sep="\n")


def dial(rows: Rows) -> dict[str, list[tuple[str, float, float]]]:
    """For the chart: error inside and drift outside, means over seeds, of prior weights and of the mask alone as it trains."""
    lines: dict[str, list[tuple[str, float, float]]] = {"prior_weight": [], "mask alone, by step": [], "": []}
    for weight in DIAL:
        lines["prior_weight"].append((f"{weight:g}", *_point(rows, prior(weight).key)))
    steps = sorted({int(row["step"]) for row in rows if row["arm"] == MASK.key and row["experiment"] == "photographs"})
    for step in steps:
        lines["mask alone, by step"].append((str(step), *_point(rows, MASK.key, step)))
    for way in (NO_MASK, FLOOR):
        lines[""].append((way.title, *_point(rows, way.key)))
    return lines


def _point(rows: Rows, arm: str, step: int = STEPS["photographs"]) -> tuple[float, float]:
    mine = [row for row in rows if (row["experiment"], row["arm"], int(row["step"])) == ("photographs", arm, step)]
    inside, drift = (float(np.mean([float(row[field]) for row in mine])) for field in ("inside", "drift_outside"))
    return inside, drift


def pictures(folder: Path, output: Path) -> list[Path]:
    """The pictures of one seed, for people: subjects at places, the logo, the pair. Nothing where they were not drawn yet."""
    titles = {way.key: way.title for way in (NO_MASK, MASK)} | {DEFAULT.key: "mask + prior"}
    drawn: dict[str, dict[str, np.ndarray]] = {}
    for experiment in ("photographs", "watermark", "pair"):
        for arm in ("base", *titles):
            file = folder / f"{experiment}-{arm}.png"
            if not file.exists():
                return []
            column = np.asarray(Image.open(file))
            drawn.setdefault(experiment, {})[arm] = column.reshape(-1, pipeline.SIDE, *column.shape[1:])
    theme = figures.THEMES["light"]
    drawings = {
        "subjects": figures.draw_samples(
            _shown("photographs"), drawn["photographs"], SHOWN_PLACES, {"base": "base model"} | titles, theme
        ),
        "watermark": _every("watermark", drawn, titles),
        "pair": _every("pair", drawn, titles),
    }
    files = []
    for name, figure in drawings.items():
        file = output / f"proof_{name}.jpg"
        file.write_bytes(figures.to_jpeg(figure))
        files.append(file)
    return files


def _shown(experiment: str) -> list[figures.Shown]:
    examples = trained(experiment)
    assert examples.masks is not None
    decoded = [decode(latents) for latents in examples.latents]
    return [
        figures.Shown(name, picture, mask[0].numpy(), picture, {})
        for name, picture, mask in zip(examples.names, decoded, examples.masks, strict=True)
    ]


def _every(experiment: str, drawn: dict[str, dict[str, np.ndarray]], titles: dict[str, str]) -> Any:
    """Eight pictures of each LoRA in one experiment: its subjects at as many places as that takes."""
    everything, count = _shown(experiment), len(SHOWN_PLACES)
    subjects = [(i, item) for i, item in enumerate(everything) if item.name in photos.SUBJECTS]
    step = max(1, count * len(subjects) // 8)
    spots = [(i, item, place) for i, item in subjects for place in range(0, count, step)]
    heads = [f"{item.name},\n{SHOWN_PLACES[place]}" for _, item, place in spots]
    rows = {"photograph": [item.decoded for _, item, _ in spots]} | {
        title: [drawn[experiment][key][i * count + place] for i, _, place in spots] for key, title in titles.items()
    }
    return figures.draw_rows(rows, heads, figures.THEMES["light"], masks=[item.mask for _, item, _ in spots])
