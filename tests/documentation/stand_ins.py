"""What stands in for a command that CI cannot run, and why it cannot.

Everything else of a page runs as it is written. A stand-in still fails where the command is wrong: flags that do not exist, extras
and targets that are none, scripts that no family of the trainer has.
"""

from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from masked_loss_triton.cache.dataset import load_datasets
from masked_loss_triton.cache.families import FAMILIES, named
from masked_loss_triton.cli import build_parser
from masked_loss_triton.integration.musubi import options
from tests.cache.support import Lab
from tests.documentation.blocks import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FRAMES = 9  # of the clips: latent frames 3
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# Caching scripts of the trainer for texts; the ones for latents are those of the families. Source: musubi-tuner 0.3.4.
TEXTS = ("wan_cache_text_encoder_outputs", "cache_text_encoder_outputs", "qwen_image_cache_text_encoder_outputs")
CACHING = {"cache_latents": "hv", "wan_cache_latents": "wan", "qwen_image_cache_latents": "qwen"}


def parse(words: Sequence[str]) -> None:
    """The flags exist, and take what they are given."""
    build_parser().parse_args([word for word in words[1:] if word != "..."])


def parse_training(words: Sequence[str]) -> None:
    """The family exists; the flags that look like ours are ours. The trainer's own are tried in tests/lab."""
    words = [word for word in words if word != "..."]
    where = words.index("train") + 1 if "train" in words else words.index("masked_loss_triton.integration.musubi") + 1
    if words[where] == "--musubi":
        where += 2
    assert named(words[where]) in FAMILIES
    parser = options.add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    given, rest = parser.parse_known_args(words[where + 1 :])
    ours = tuple(f"--{prefix}" for prefix in (*options.PREFIXES, "invert_mask", "normalize_per"))
    assert [word for word in rest if word.startswith(ours)] == []
    options.from_namespace(given)


def parse_example(words: Sequence[str]) -> None:
    from train_diffusers import build_parser as parser

    flags = [word for word in words[2:] if word != "..."]
    flags += [] if "--arch" in flags else ["--arch", "wan", "--tiny", "--cache", "cache", "--output", "lora"]
    parser().parse_args(flags)


def check_pip(words: Sequence[str]) -> None:
    """The extras exist. tests/test_packaging.py asks pip what they would install."""
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(words)):
        assert set(extras.split(",")) <= EXTRAS.keys(), extras


def check_make(words: Sequence[str]) -> None:
    assert set(words[1:2]) <= TARGETS


def check_module(words: Sequence[str]) -> None:
    """python -m pytest FOLDER."""
    assert all((ROOT / word).exists() for word in words[3:] if not word.startswith("-"))


def write_caches(words: Sequence[str]) -> None:
    """Latent caches of random numbers, named as the trainer's script names them, for the items of the dataset file."""
    script, toml = words[1].removesuffix(".py"), Path(words[words.index("--dataset_config") + 1])
    if script in TEXTS:
        return
    family = FAMILIES[CACHING[script]]
    for dataset in load_datasets(toml):
        lab = Lab(Path("lab"), family.suffixes[0])
        lab.toml, lab.cache = toml, Path(dataset.cache_directory)
        shutil.rmtree(lab.cache, ignore_errors=True)  # of another family, on a page about several
        lab.cache.mkdir(parents=True)
        for path in sorted(Path(dataset.directory).iterdir()):
            if path.suffix == ".mp4":
                lab.add_cache(f"{path.stem}_00000-{FRAMES:03d}", (128, 128), frames=(FRAMES - 1) // 4 + 1)
            elif path.suffix in (".png", ".jpg"):
                with Image.open(path) as picture:
                    lab.add_cache(path.stem, picture.size)


def nothing(_: Sequence[str]) -> None:
    pass


# What the command begins with or holds, why CI cannot run it, and what stands in for it. The first that fits counts.
STAND_INS: list[tuple[str, str, Callable[[Sequence[str]], None]]] = [
    (r"^pip install", "would change the environment of the tests; tests/test_packaging.py and tests/lab do it", check_pip),
    (r"^hf download", "gigabytes from a network", nothing),
    (r"^make ", "makes environments of its own, and runs these tests", check_make),
    (r"^python -m pytest", "runs these tests", check_module),
    (r"^python \w*cache_\w+\.py", "the trainer's own, with real weights; tests/lab runs it with tiny ones", write_caches),
    (r"^masked-loss train|integration\.musubi", "needs the trainer; tests/lab runs it in the real one", parse_training),
    (r"^python examples/train_diffusers\.py", "real weights, or half a command; tests/examples runs it", parse_example),
    (r"--text_prompt", "weights of Florence-2 and SAM 2, gigabytes; tests/generate runs it with tiny ones", parse),
    (r"--ray_address", "a cluster; tests/farm runs a Ray on this machine", parse),
]  # fmt: skip


def stand_in(command: str) -> tuple[str, Callable[[Sequence[str]], None]] | None:
    """The reason and what to do instead; None for what is run."""
    return next(((reason, act) for pattern, reason, act in STAND_INS if re.search(pattern, command)), None)


def write_clip(path: Path) -> None:
    import av

    rng = np.random.default_rng(1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 128
        stream.pix_fmt = "yuv420p"
        for frame in range(FRAMES):
            pixels = rng.integers(0, 90, (128, 128, 3), dtype=np.uint8)
            pixels[32:96, 8 * frame : 48 + 8 * frame] = (230, 150, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def furnish(folder: Path, masks: bool) -> None:
    """A user's folder: four photographs that scikit-image ships, captions, a clip with a mask of each frame, the dataset file.

    masks: whether masks of the photographs are there already.
    """
    import skimage

    (folder / "photos").mkdir(parents=True)
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        photo = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        side = min(photo.size)  # square, so that the trainer's crop cuts nothing off
        photo = ImageOps.fit(photo, (side, side)).resize((256, 256))
        photo.save(folder / "photos" / name)
        (folder / "photos" / name).with_suffix(".txt").write_text("a photograph")
        if masks:
            (folder / "masks").mkdir(exist_ok=True)
            mask = np.zeros(photo.size[::-1], np.uint8)
            mask[photo.height // 4 : -photo.height // 4, photo.width // 4 : -photo.width // 4] = 255
            Image.fromarray(mask).save(folder / "masks" / f"{Path(name).stem}.png")
    (folder / "dataset.toml").write_text(
        '[general]\nresolution = [128, 128]\ncaption_extension = ".txt"\nenable_bucket = true\n'
        '[[datasets]]\nimage_directory = "photos"\ncache_directory = "cache"\n'
    )
    (folder / "hv" / "clips").mkdir(parents=True)
    (folder / "hv" / "masks" / "vid1").mkdir(parents=True)
    write_clip(folder / "hv" / "clips" / "vid1.mp4")
    (folder / "hv" / "clips" / "vid1.txt").write_text("a block that moves")
    for frame in range(FRAMES):
        mask = np.zeros((128, 128), np.uint8)
        mask[32:96, 8 * frame : 48 + 8 * frame] = 255
        Image.fromarray(mask).save(folder / "hv" / "masks" / "vid1" / f"{frame:04d}.png")


def open_and_end(command: Sequence[str], environment: dict[str, str], folder: Path | None = None) -> None:
    """Runs `masked-loss edit`, which serves until Ctrl+C: fetches the page that it prints, and interrupts it."""
    environment = {**environment, "BROWSER": "true"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.search(r"http://127\.0\.0\.1:\S+", process.stdout.readline())
            assert address, command
            with urllib.request.urlopen(address[0]) as answer:
                assert b"<title>" in answer.read()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
