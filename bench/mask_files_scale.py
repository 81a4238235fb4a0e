"""Cost per item of check and of both runs of cache, counted, on data sets of growing size: it has to stay flat.

    python -m bench.mask_files_scale --items 1000 5000 50000

Function calls, C functions included, and opened files do not depend on the load of the machine; processor time is printed
beside them and does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import itertools
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from masked_loss_triton.cli import main

STEPS = {"check": ("check", "--ignore", "unmasked"), "cache, first": ("cache",), "cache, second": ("cache",)}
SIDE, CELLS = 64, 8

OPENED = itertools.count()


def _count_opened(event: str, _: tuple) -> None:
    if event == "open":
        next(OPENED)


@dataclasses.dataclass
class Cost:
    """What one command took: function calls, opened files, seconds of processor time."""

    calls: int = 0
    opened: int = 0
    seconds: float = 0.0


def make_dataset(folder: Path, items: int, layers: int = 1) -> Path:
    """Writes pictures, captions, masks and caches of one small picture each, and returns the dataset file.

    Args:
        folder: where to; must exist.
        items: how many.
        layers: pictures for each of them, as layered models have.
    """
    for name in ("images", "masks", "cache"):
        (folder / name).mkdir()
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:48, 8:40] = 255
    png, picture = io.BytesIO(), io.BytesIO()
    Image.fromarray(mask).save(png, "PNG")
    Image.fromarray(mask).convert("RGB").save(picture, "PNG")
    first = folder / "first.safetensors"
    latents = torch.zeros(4, layers, CELLS, CELLS, dtype=torch.bfloat16)
    save_file({f"latents_{layers}x{CELLS}x{CELLS}_bfloat16": latents}, first, {"architecture": "wan"})
    cache = first.read_bytes()
    first.unlink()
    for index in range(items):
        stem = f"picture_{index:06d}"
        for name in (stem, *(f"{stem}_{layer}" for layer in range(1, layers))):
            (folder / "images" / f"{name}.png").write_bytes(picture.getvalue())
        (folder / "images" / f"{stem}.txt").write_text("a caption")
        (folder / "masks" / f"{stem}.png").write_bytes(png.getvalue())
        (folder / "cache" / f"{stem}_{SIDE:04d}x{SIDE:04d}_wan.safetensors").write_bytes(cache)
    config = folder / "dataset.toml"
    config.write_text(
        f'[[datasets]]\nresolution = {SIDE}\ncaption_extension = ".txt"\nimage_directory = "{folder}/images"\n'
        f'cache_directory = "{folder}/cache"\nmask_directory = "{folder}/masks"\nmultiple_target = {str(layers > 1).lower()}\n'
    )
    return config


@contextlib.contextmanager
def counted() -> Iterator[Cost]:
    """Counts what happens inside, in this thread and in those that are started there."""
    cost, calls = Cost(), itertools.count()

    def profile(frame: object, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            next(calls)

    opened, started = next(OPENED), time.process_time()
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield cost
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        cost.seconds = time.process_time() - started
        cost.calls, cost.opened = next(calls), next(OPENED) - opened - 1


def measure(folder: Path, items: int, layers: int = 1) -> dict[str, Cost]:
    """Makes a dataset in the folder and returns the cost of each of STEPS on it."""
    config = make_dataset(folder, items, layers)
    costs = {}
    for step, (command, *flags) in STEPS.items():
        with counted() as cost, contextlib.redirect_stdout(io.StringIO()):
            status = main([command, "--dataset_config", str(config), *flags, "--workers", "1"])
        if status:
            raise RuntimeError(f"{step} ended with status {status}")
        costs[step] = cost
    return costs


sys.addaudithook(_count_opened)


def run(arguments: Sequence[str] | None = None) -> None:
    """Prints a table: one row for each command and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1000, 5000], metavar="N")
    parser.add_argument("--folder", type=Path, help="where data sets are made and removed again (default: temporary)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=args.folder) as warm:
        measure(Path(warm), 3)  # what is imported at the first use
    print(f"{'command':<14} {'items':>7} {'calls/item':>11} {'opened/item':>12} {'ms/item':>8} {'peak MiB':>9}")
    for items in args.items:
        folder = Path(tempfile.mkdtemp(dir=args.folder))
        try:
            for step, cost in measure(folder, items).items():
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                row = (cost.calls / items, cost.opened / items, 1e3 * cost.seconds / items, peak)
                print(
                    f"{step:<14} {items:>7} {row[0]:>11.1f} {row[1]:>12.2f} {row[2]:>8.2f} {row[3]:>9.0f}", flush=True
                )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    run()
