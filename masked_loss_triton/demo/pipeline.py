"""The demo from start to end: photographs, masks, caches, base model, four LoRAs, measurements, report."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from masked_loss_triton.backend import choose
from masked_loss_triton.call import Backend
from masked_loss_triton.demo import dataset, figures, model, photos, report, tuning
from masked_loss_triton.demo.encoder import PATCH, decode
from masked_loss_triton.demo.evaluation import SHOWN_PLACES, TIMES, Claim, Sampler, Samples, Scores, Test, check_claims
from masked_loss_triton.demo.output import MADE_BY, REPORT, complete_folder
from masked_loss_triton.errors import UserError
from masked_loss_triton.files.progress import Progress
from masked_loss_triton.masks.geometry import resize_to_bucket
from masked_loss_triton.masks.reading import read_picture

SIDE = 64  # pixels of the square the photographs are brought to
BASE_STEPS, QUICK_BASE_STEPS = 2000, 12
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
    backend: Backend
    quick: bool

    @property
    def base_steps(self) -> int:
        return QUICK_BASE_STEPS if self.quick else BASE_STEPS


@dataclasses.dataclass(frozen=True)
class Results:
    """What training gave: models by "base" and the ways' keys, their scores and pictures, and how they got there."""

    models: dict[str, Any]
    scores: dict[str, Scores]
    samples: dict[str, Samples]
    curves: dict[str, figures.Curves]
    base_losses: list[float]
    test: Test
    sampler: Sampler


# The matrices are too small for more: beside another program each operation would wait for whichever thread was put aside. And
# the numbers are the same whatever the number of cores.
THREADS = 1


def run_demo(settings: Settings) -> int:
    """Runs everything and writes the report folder. Returns the exit status."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return _run(settings)
    finally:
        torch.set_num_threads(threads)


class Stages:
    """The stages of the run, a progress bar for each, and how many seconds they took, by title."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, title: str, steps: int = 0) -> Iterator[Progress]:
        with Progress(f"[{len(self.seconds) + 1}/{self.total}] {title}", steps) as progress:
            yield progress
        self.seconds[title] = round(progress.seconds, 2)


def _run(settings: Settings) -> int:
    start = time.perf_counter()
    device, backend = _choose(settings)
    titles = {"base": "base model"} | {way.key: way.title for way in tuning.WAYS}
    stages = Stages(4 + len(tuning.WAYS))
    with complete_folder(settings.output) as folder:
        with stages.stage("photographs, masks and caches") as progress:
            pictures = photos.shipped_photos()
            if settings.images is not None:
                pictures = photos.read_folder(settings.images, progress.say)
            dataset.make_dataset(pictures, folder, SIDE, progress.say)
            subjects = dataset.read_caches(folder, device)
        results = _train(settings, subjects, device, backend, stages)
        with stages.stage("pictures and report"):
            table = report.table_of(results.scores, results.samples)
            claims = check_claims(results.scores, results.samples)
            drawn = _draw(folder, subjects, results, titles)
            _save_models(folder, settings, results)
            facts = _facts(settings, device, backend, time.perf_counter() - start)
            report.write_html(folder / "report.html", table, titles, claims, drawn, facts, settings.quick)
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
            "seconds": stages.seconds,
            "total_seconds": round(time.perf_counter() - start, 2),
        }
        report.write_json(folder / REPORT, content)
    print(report.text_table(table, titles), end="\n\n")
    return _conclude(settings, claims, time.perf_counter() - start)


def _choose(settings: Settings) -> tuple[torch.device, Backend]:
    """The device to train on, and the backend that the loss will use there."""
    has_gpu = torch.cuda.is_available()
    if settings.device == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch sees no CUDA or ROCm device here; use --device cpu", 2)
    device = torch.device("cuda" if has_gpu and settings.device != "cpu" else "cpu")
    try:
        return device, choose(settings.backend, torch.empty(0, device=device))
    except ValueError as error:
        raise UserError(f"--backend {settings.backend}: {error}", 2) from error


def _train(
    settings: Settings, subjects: tuning.Examples, device: torch.device, backend: Backend, stages: Stages
) -> Results:
    with stages.stage("places, encoded"):
        places = tuning.place_examples(SIDE, device)
        base = model.build_model(settings.seed, device)
    base_losses: list[float] = []
    with stages.stage("base model", settings.base_steps) as progress:

        def after_step(_: int, loss: float) -> None:
            base_losses.append(loss)
            progress.advance(note=f"loss {loss:.3f}")

        tuning.train_base(base, places, settings.base_steps, settings.seed, backend, after_step)
        test, sampler = Test(base, subjects), Sampler(base, subjects)
    drawn = {"base": sampler.judge(sampler.base)}
    results = Results({"base": base}, {"base": test.score(base)}, drawn, {}, base_losses, test, sampler)
    for way in tuning.WAYS:
        with stages.stage(f"LoRA: {way.title}", settings.steps) as progress:
            _tune(settings, subjects, way, backend, results, progress)
    return results


def _tune(
    settings: Settings,
    subjects: tuning.Examples,
    way: tuning.Way,
    backend: Backend,
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
        progress.advance(note=f"loss {loss:.3f}  inside {curves.inside[-1]:.3f}")

    tuning.tune(tuned, subjects, way, settings.steps, settings.seed, backend, after_step)
    results.models[way.key], results.scores[way.key] = tuned, results.test.score(tuned)
    results.samples[way.key] = results.sampler.score(tuned)
    results.curves[way.key] = curves


def _draw(folder: Path, subjects: tuning.Examples, results: Results, titles: dict[str, str]) -> dict[str, str]:
    """Writes the PNGs and returns the figures of the page."""
    shown = _shown(folder, subjects, results)
    ways = {key: title for key, title in titles.items() if key != "base"}
    pictures = {key: drawn.pictures for key, drawn in results.samples.items()}
    drawings: dict[str, Any] = {
        "photos": lambda theme: figures.draw_photos(shown, theme),
        "samples": lambda theme: figures.draw_samples(shown, pictures, SHOWN_PLACES, titles, theme),
        "drifts": lambda theme: figures.draw_drifts(shown, ways, theme),
        "curves": lambda theme: figures.draw_curves(results.base_losses, results.curves, ways, theme),
    }
    pages = {}
    for name, draw in drawings.items():
        drawn = {theme: draw(colours) for theme, colours in figures.THEMES.items()}
        (folder / f"{name}.png").write_bytes(figures.to_png(drawn["light"]))
        webps = {theme: figures.to_webp(figure) for theme, figure in drawn.items()}
        pages[name] = report.figure_html(webps, *report.CAPTIONS[name])
    return pages


def _shown(folder: Path, subjects: tuning.Examples, results: Results) -> list[figures.Shown]:
    assert subjects.masks is not None
    side = subjects.latents.shape[-1] * PATCH
    shown = []
    for i, name in enumerate(subjects.names[: figures.MAX_SHOWN]):
        decoded = decode(subjects.latents[i])
        shown.append(
            figures.Shown(
                name,
                resize_to_bucket(read_picture(folder / dataset.PHOTOS / f"{name}.png").rgb, (side, side)),
                subjects.masks[i, 0].cpu().numpy(),
                decoded,
                {way: results.scores[way].drift_map[i].numpy() for way in results.curves},
            )
        )
    return shown


def _save_models(folder: Path, settings: Settings, results: Results) -> None:
    results.models["base"].save_pretrained(folder / "base")
    (folder / "loras").mkdir()
    for way in tuning.WAYS:
        model.save_lora(results.models[way.key], folder / "loras" / f"{way.key}.safetensors")
    config = {
        "model": model.MODEL_CONFIG,
        "lora": {"rank": model.LORA_RANK, "alpha": model.LORA_RANK, "targets": model.LORA_TARGETS},
        "learning_rates": {"base": tuning.BASE_LEARNING_RATE, "lora": tuning.LORA_LEARNING_RATE},
        "batch": tuning.BATCH,
        "side": SIDE,
        "test": {"times": TIMES, "places": SHOWN_PLACES},
        "ways": {
            way.key: {"mask": way.uses_mask, "prior": way.uses_prior, "loss": way.config.to_dict()}
            for way in tuning.WAYS
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
        "Latents": f"16 × 1 × {SIDE // 8} × {SIDE // 8}, from {SIDE} × {SIDE} pixels",
        "Loss": f"backend {backend} on {_device_name(device)}",
        "Time": f"{seconds:.0f} seconds",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _conclude(settings: Settings, claims: list[Claim], seconds: float) -> int:
    if settings.quick:
        print("--quick trains too little to show anything: the claims are not judged.")
    else:
        for claim in claims:
            print(f"{'shown    ' if claim.holds else 'NOT SHOWN'}  {claim.text}")
    print(f"\n{settings.output / 'report.html'} ({seconds:.0f} s)")
    return 0 if settings.quick or all(claim.holds for claim in claims) else 1
