"""Pictures whose subject GrabCut finds, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from masked_loss_triton.cli import main


def subject(seed: int = 0, size: tuple[int, int] = (96, 64)) -> tuple[np.ndarray, np.ndarray]:
    """(picture, mask): a bright ellipse, not quite in the middle, before a dark noisy ground."""
    width, height = size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    cx, cy = width * rng.uniform(0.4, 0.6), height * rng.uniform(0.4, 0.6)
    mask = ((x - cx) / (0.25 * width)) ** 2 + ((y - cy) / (0.3 * height)) ** 2 <= 1
    picture = np.where(mask[..., None], (230, 150, 40), (20, 50, 90)) + rng.integers(0, 20, (height, width, 3))
    return picture.astype(np.uint8), mask


def save(path: Path, seed: int = 0, **options: Any) -> np.ndarray:
    """Writes the picture of `subject` and returns its mask; options go to Pillow."""
    picture, mask = subject(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, **options)
    return mask


def words(folder: Path, *flags, source: str = "in", out: str = "out") -> list[str]:
    """A command line on folder/in with GrabCut; without a contact sheet, unless the flags ask for one."""
    paths = ["--images", str(folder / source), "--masks", str(folder / out)]
    quiet = [] if "--sheet_limit" in flags else ["--sheet_limit", "0"]
    return ["generate", *paths, "--backend", "grabcut", *quiet, *map(str, flags)]


def generate(folder: Path, *flags, **folders: str) -> int:
    """Runs `words` in this process."""
    return main(words(folder, *flags, **folders))


def write_clip(path: Path, frames: list[np.ndarray], fps: int = 16) -> None:
    """(H, W, 3) uint8 frames as H.264, very nearly lossless."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
