"""The demo from start to end: photographs, masks, caches, base model, four LoRAs, measurements, report."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from masked_loss_triton.backend import choose
from masked_loss_triton.demo import dataset, figures, model, photos, report, training
from masked_loss_triton.demo.claims import Claim, check_claims
from masked_loss_triton.demo.encoder import PATCH, decode
from masked_loss_triton.demo.evaluate import SHOWN_TIME, TIMES, Scores, Test
from masked_loss_triton.demo.folder import MADE_BY, REPORT, complete_folder
from masked_loss_triton.demo.progress import Progress
from masked_loss_triton.errors import UserError

SIDE, QUICK_SIDE = 192, 64  # pixels of the square the photographs are brought to
BASE_STEPS, QUICK_BASE_STEPS = 500, 12
MEASUREMENTS = 10  # of each LoRA while it is tuned
PACKAGES = ("torch", "diffusers", "peft", "numpy", "opencv-python", "safetensors", "scikit-image", "scikit-learn")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked for, checked."""

    output: Path
    images: Path | None
    steps: int
    seed: int
    device: str
    backend: str
    quick: bool

    @property
    def side(self) -> int:
        return QUICK_SIDE if self.quick else SIDE

    @property
    def base_steps(self) -> int:
        return QUICK_BASE_STEPS if self.quick else BASE_STEPS


@dataclasses.dataclass(frozen=True)
class Results:
    """What training gave: models by "base" and the ways' keys, their scores, and how they got there."""

    models: dict[str, Any]
    scores: dict[str, Scores]
    curves: dict[str, figures.Curves]
    base_losses: list[float]
    test: Test


# One thread: the matrices are too small for more. Measured on 2 cores: 61 ms a step with one thread, 42 with two; with another
# program on the machine 127 and 377, since each operation then waits for whichever thread was put aside. And the numbers are the
# same whatever the number of cores.
THREADS = 1


def run_demo(settings: Settings) -> int:
    """Runs everything and writes the report folder. Returns the exit status."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _run(settings)
    finally:
        torch.set_num_threads(threads)


def _run(settings: Settings) -> int:
    start = time.perf_counter()
    device, backend = _choose(settings)
    titles = {"base": "base model"} | {way.key: way.title for way in training.WAYS}
    with complete_folder(settings.output) as folder, Progress(4 + len(training.WAYS)) as progress:
        progress.stage("photographs and masks")
        subjects = _prepare(settings, folder, device, progress)
        results = _train(settings, subjects, device, backend, progress)
        progress.stage("pictures and report")
        table, claims = report.table_of(results.scores), check_claims(results.scores)
        pictures = _draw(folder, subjects, results, titles)
        _save_models(folder, settings, results)
        facts = _facts(settings, device, backend, time.perf_counter() - start)
        report.write_html(folder / "report.html", table, titles, claims, pictures, facts, settings.quick)
        content = {
            "made_by": MADE_BY,
            "table": table,
            "claims": {claim.key: claim.holds for claim in claims},
            "photographs": list(subjects.names),
            "seed": settings.seed,
            "steps": settings.steps,
            "base_steps": settings.base_steps,
            "quick": settings.quick,
            "device": _device_name(device),
            "backend": backend,
            "versions": _versions(),
            "seconds": {title: round(seconds, 2) for title, seconds in progress.seconds.items()},
            "total_seconds": round(time.perf_counter() - start, 2),
        }
        report.write_json(folder / REPORT, content)
    print(report.text_table(table, titles), end="\n\n")
    return _conclude(settings, claims, time.perf_counter() - start)


def _choose(settings: Settings) -> tuple[torch.device, str]:
    """The device to train on, and the backend that the loss will use there."""
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch sees no CUDA or ROCm device here; use --device cpu", 2)
    device = torch.device("cuda" if has_gpu and settings.device != "cpu" else "cpu")
    try:
        return device, choose(settings.backend, torch.empty(0, device=device))
    except ValueError as error:
        raise UserError(f"--backend {settings.backend}: {error}", 2) from error


def _prepare(settings: Settings, folder: Path, device: torch.device, progress: Progress) -> training.Examples:
    """Photographs to RGBA files to caches, and the caches read back."""
    if settings.images is None:
        pictures = photos.shipped_photos()
    else:
        pictures = dataset.read_folder(settings.images, progress.warn)
    files = dataset.write_rgba(pictures, folder / "photos", progress.warn)
    return dataset.read_caches(dataset.write_caches(files, folder / "caches", settings.side), device)


def _train(
    settings: Settings, subjects: training.Examples, device: torch.device, backend: str, progress: Progress
) -> Results:
    progress.stage("the world, encoded")
    world = training.world_examples(photos.world_pictures(), settings.side, settings.seed, device)
    base = model.build_model(settings.seed, device)
    base_losses: list[float] = []

    def base_step(step: int, loss: float) -> None:
        base_losses.append(loss)
        progress.step(step, f"loss {loss:.3f}")

    progress.stage("base model", settings.base_steps)
    training.train_base(base, world, settings.base_steps, settings.seed, backend, base_step)
    test = Test(base, subjects)
    results = Results({"base": base}, {"base": test.score(base)}, {}, base_losses, test)
    for way in training.WAYS:
        progress.stage(f"LoRA: {way.title}", settings.steps)
        _tune(settings, subjects, way, backend, results, progress)
    return results


def _tune(
    settings: Settings,
    subjects: training.Examples,
    way: training.Way,
    backend: str,
    results: Results,
    progress: Progress,
) -> None:
    """One way of tuning, measured as it goes; adds it to `results`."""
    before = results.scores["base"]
    curves = figures.Curves([], [0], [before.inside], [before.drift_outside])
    tuned = model.with_lora(results.models["base"], settings.seed)
    interval = max(1, settings.steps // MEASUREMENTS)

    def after_step(step: int, loss: float) -> None:
        curves.losses.append(loss)
        if step % interval == 0 or step == settings.steps:
            scores = results.test.score(tuned)
            curves.steps.append(step)
            curves.inside.append(scores.inside)
            curves.drift_outside.append(scores.drift_outside)
        progress.step(step, f"loss {loss:.3f}  inside {curves.inside[-1]:.3f}")

    training.tune(tuned, subjects, way, settings.steps, settings.seed, backend, after_step)
    results.models[way.key], results.scores[way.key] = tuned, results.test.score(tuned)
    results.curves[way.key] = curves


def _draw(folder: Path, subjects: training.Examples, results: Results, titles: dict[str, str]) -> dict[str, str]:
    """Writes the PNGs and returns the figures of the page."""
    shown = _shown(folder, subjects, results)
    ways = {key: title for key, title in titles.items() if key != "base"}
    drawings: dict[str, Any] = {
        "photos": lambda theme: figures.draw_photos(shown, theme),
        "predictions": lambda theme: figures.draw_predictions(shown, titles, theme),
        "drifts": lambda theme: figures.draw_drifts(shown, ways, theme),
        "curves": lambda theme: figures.draw_curves(results.base_losses, results.curves, ways, theme),
    }
    pages = {}
    for name, draw in drawings.items():
        pngs = {theme: figures.to_png(draw(colours)) for theme, colours in figures.THEMES.items()}
        (folder / f"{name}.png").write_bytes(pngs["light"])
        pages[name] = report.figure_html(pngs, *report.CAPTIONS[name])
    return pages


def _shown(folder: Path, subjects: training.Examples, results: Results) -> list[figures.Shown]:
    assert subjects.masks is not None
    predictions = {key: results.test.pictures(tuned) for key, tuned in results.models.items()}
    shown = []
    for i, name in enumerate(subjects.names[: figures.MAX_SHOWN]):
        decoded = decode(subjects.latents[i])
        shown.append(
            figures.Shown(
                name,
                dataset.read_square(folder / "photos" / f"{name}.png", subjects.latents.shape[-1] * PATCH),
                subjects.masks[i, 0].cpu().numpy(),
                decoded,
                {key: decode(latents[i]) for key, latents in predictions.items()},
                {way: results.scores[way].drift_map[i].numpy() for way in results.curves},
            )
        )
    return shown


def _save_models(folder: Path, settings: Settings, results: Results) -> None:
    results.models["base"].save_pretrained(folder / "base")
    (folder / "loras").mkdir()
    for way in training.WAYS:
        model.save_lora(results.models[way.key], folder / "loras" / f"{way.key}.safetensors")
    config = {
        "model": model.MODEL_CONFIG,
        "lora": {"rank": model.LORA_RANK, "alpha": model.LORA_RANK, "targets": model.LORA_TARGETS},
        "learning_rates": {"base": training.BASE_LEARNING_RATE, "lora": training.LORA_LEARNING_RATE},
        "batch": training.BATCH,
        "side": settings.side,
        "test": {"times": TIMES, "shown_time": SHOWN_TIME},
        "ways": {
            way.key: {"mask": way.uses_mask, "prior": way.uses_prior, "loss": way.config.to_dict()}
            for way in training.WAYS
        },
    }
    report.write_json(folder / "config.json", config)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("masked_loss_triton", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"  # for example opencv-python-headless in its place
    return versions


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _facts(settings: Settings, device: torch.device, backend: str, seconds: float) -> dict[str, str]:
    versions = _versions()
    return {
        "Seed": str(settings.seed),
        "Steps": f"{settings.base_steps} for the base model, {settings.steps} for each LoRA",
        "Latents": f"16 × 1 × {settings.side // 8} × {settings.side // 8}, from {settings.side} × {settings.side} pixels",
        "Loss": f"backend {backend} on {_device_name(device)}",
        "Time": f"{seconds:.0f} seconds",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _conclude(settings: Settings, claims: list[Claim], seconds: float) -> int:
    for claim in claims:
        print(f"{'shown    ' if claim.holds else 'NOT SHOWN'}  {claim.text}")
    print(f"\n{settings.output / 'report.html'} ({seconds:.0f} s)")
    if settings.quick:
        print("--quick trains too little to show anything; the claims count only without it.", file=sys.stderr)
        return 0
    return 0 if all(claim.holds for claim in claims) else 1
