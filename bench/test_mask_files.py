"""Masks from files into latent caches: images per second against the steps that other trainers do on the same files.

Each peer's steps are written from the facts of its source, not with its code, and run with as many threads as ours:
    blissful        open, to grey, resize to cover the bucket, centre crop, area to latent size
    sd-scripts      open as RGBA, resize, centre crop, float32 in [0, 1] at the bucket's size, area to latent size at each step
    ai-toolkit      open, EXIF, RGB, Gaussian blur at full size, grey, bicubic, crop, nearest to latent size
    diffusion-pipe  open, RGB, bicubic fit, first channel, float16, nearest-exact to latent size
"into the cache" adds what it takes to have the mask in an existing cache file: a peer's way is to load the tensors and save
them all with one more; ours also hashes the mask, writes atomically and waits for the disk.

    python -m pytest bench/test_mask_files.py --benchmark-enable --benchmark-columns=min,median,ops
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from safetensors.torch import load_file, save_file

from masked_loss_triton.cache.dataset import load_datasets
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.inject import inject, prepare
from masked_loss_triton.files.parallel import default_workers, run_parallel
from masked_loss_triton.masks.geometry import resize_to_bucket, to_latent
from masked_loss_triton.masks.reading import read_mask_file

COUNT, SIZE, BUCKET = 48, (1536, 1024), (1168, 784)
CELLS = (BUCKET[1] // 8, BUCKET[0] // 8)
WORKERS = default_workers()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """48 masks of 1536x1024 as segmentation gives them, with caches of 16x1x98x146 in bfloat16."""
    folder = tmp_path_factory.mktemp("bench")
    for name in ("images", "masks", "cache"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    for index in range(COUNT):
        canvas = np.zeros(SIZE[::-1], np.uint8)
        points = rng.integers((200, 150), (1300, 850), (7, 2))
        cv2.fillPoly(canvas, [cv2.convexHull(points.astype(np.int32))], 255, lineType=cv2.LINE_AA)
        mask = cv2.GaussianBlur(canvas, (0, 0), 3)
        Image.fromarray(mask).save(folder / "masks" / f"p{index}.png")
        (folder / "images" / f"p{index}.png").touch()
        latents = {f"latents_1x{CELLS[0]}x{CELLS[1]}_bfloat16": torch.randn(16, 1, *CELLS).bfloat16()}
        save_file(latents, folder / "cache" / f"p{index}_{SIZE[0]}x{SIZE[1]}_wan.safetensors")
    (folder / "dataset.toml").write_text(
        f'[[datasets]]\nresolution = [1024, 896]\nenable_bucket = true\nimage_directory = "{folder}/images"\n'
        f'cache_directory = "{folder}/cache"\nmask_directory = "{folder}/masks"\n'
    )
    return folder


def cover(image: Image.Image, resample: Image.Resampling | None) -> np.ndarray:
    """Scaled to cover the bucket, centre cropped; OpenCV's area where `resample` is None."""
    scale = max(BUCKET[0] / image.width, BUCKET[1] / image.height)
    size = (int(image.width * scale + 0.5), int(image.height * scale + 0.5))
    if resample is None:
        array = cv2.resize(np.array(image), size, interpolation=cv2.INTER_AREA)
    else:
        array = np.array(image.resize(size, resample))
    x, y = (size[0] - BUCKET[0]) // 2, (size[1] - BUCKET[1]) // 2
    return array[y : y + BUCKET[1], x : x + BUCKET[0]]


def area(array: np.ndarray, mode: str = "area") -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array)).float()[None, None] / 255
    return F.interpolate(tensor, size=CELLS, mode=mode)[0]


def masked_loss(path: Path) -> torch.Tensor:
    return torch.from_numpy(to_latent(resize_to_bucket(read_mask_file(path, exif=False), BUCKET), CELLS))[None]


def blissful(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        return area(cover(image.convert("L"), None))


def sd_scripts(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        rgba = np.array(image.convert("RGBA"))
    scaled = cv2.resize(rgba, BUCKET, interpolation=cv2.INTER_AREA)
    return area(np.ascontiguousarray(scaled[..., 0]))


def ai_toolkit(path: Path) -> torch.Tensor:
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    image = image.filter(ImageFilter.GaussianBlur(int(min(image.size) * 0.0025))).convert("L")
    return area(cover(image, Image.Resampling.BICUBIC), "nearest")


def diffusion_pipe(path: Path) -> torch.Tensor:
    with Image.open(path) as image:
        fitted = np.array(ImageOps.fit(image.convert("RGB"), BUCKET))[..., 0]
    half = torch.from_numpy(np.ascontiguousarray(fitted)).half()[None, None] / 255
    return F.interpolate(half.float(), size=CELLS, mode="nearest-exact")[0]


RECIPES = {one.__name__: one for one in (masked_loss, blissful, sd_scripts, ai_toolkit, diffusion_pipe)}


@pytest.mark.benchmark(group="mask file to weights")
@pytest.mark.parametrize("name", RECIPES)
def test_mask_file_to_weights(benchmark, files, name):
    masks = sorted((files / "masks").iterdir())

    def run() -> list[torch.Tensor]:
        with ThreadPoolExecutor(WORKERS) as pool:
            return list(pool.map(RECIPES[name], masks))

    results = benchmark(run)
    benchmark.extra_info["images_per_second"] = COUNT / benchmark.stats["median"] if benchmark.stats else None
    for path, result in zip(masks, results, strict=True):
        assert (result - blissful(path)).abs().mean() < 0.01, "all of them bring the same mask to the same cells"


@pytest.mark.benchmark(group="mask file into the cache")
@pytest.mark.parametrize("name", ["masked_loss", "blissful"])
def test_mask_file_into_the_cache(benchmark, files, name):
    prepared = prepare(load_datasets(files / "dataset.toml")[0], FAMILIES["wan"])
    assert len(prepared.items) == COUNT

    def peer(item) -> None:
        tensors = {key: tensor for key, tensor in load_file(item.path).items() if "mask" not in key}
        weights = blissful(files / "masks" / f"{item.stem}.png")[:, None].contiguous()
        save_file({**tensors, f"mask_weights_1x{CELLS[0]}x{CELLS[1]}_float32": weights}, item.path)

    def run() -> None:
        if name == "blissful":
            with ThreadPoolExecutor(WORKERS) as pool:
                list(pool.map(peer, prepared.items))
            return
        work = run_parallel(lambda job: inject(prepared, job, force=True), prepared.jobs(), WORKERS)
        statuses = [outcome.status for outcomes in work for outcome in outcomes]
        assert statuses == ["written"] * COUNT

    benchmark(run)
    benchmark.extra_info["images_per_second"] = COUNT / benchmark.stats["median"] if benchmark.stats else None
    assert all(any("mask_weights" in key for key in load_file(item.path)) for item in prepared.items)


PEAK = """
import resource, sys
from masked_loss_triton.cli import main
status = main(sys.argv[1:])
print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def many(folder: Path, count: int) -> list[str]:
    """A dataset of `count` pictures with masks of 256x192 and small caches; links where contents may be shared."""
    for name in ("images", "masks", "cache"):
        (folder / name).mkdir(parents=True)
    y, x = np.mgrid[:192, :256]
    Image.fromarray(((np.hypot(x - 100, y - 90) < 70) * 255).astype(np.uint8)).save(folder / "mask.png")
    save_file({"latents_1x24x32_bfloat16": torch.randn(16, 1, 24, 32).bfloat16()}, folder / "cache.safetensors")
    data = (folder / "cache.safetensors").read_bytes()
    for index in range(count):
        (folder / "images" / f"p{index}.png").touch()
        (folder / "masks" / f"p{index}.png").hardlink_to(folder / "mask.png")
        (folder / "cache" / f"p{index}_0256x0192_wan.safetensors").write_bytes(data)
    (folder / "d.toml").write_text(
        f'[[datasets]]\nresolution = [256, 192]\nimage_directory = "{folder}/images"\n'
        f'cache_directory = "{folder}/cache"\nmask_directory = "{folder}/masks"\n'
    )
    return ["cache", "--dataset_config", str(folder / "d.toml"), "--arch", "wan"]


@pytest.mark.slow
@pytest.mark.benchmark(group="ten thousand items")
def test_memory_stays_flat_over_ten_thousand_items(benchmark, tmp_path):
    def peak(count: int) -> int:
        command = many(tmp_path / str(count), count)
        result = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True, check=True)
        status, kilobytes = result.stderr.split()[-2:]
        assert status == "0", result.stderr
        assert f"{count} masks written" in result.stdout
        return int(kilobytes) // 1024

    small = peak(100)
    large = benchmark.pedantic(peak, (10_000,), rounds=1)
    benchmark.extra_info.update(peak_mib_100=small, peak_mib_10000=large)
    print(f"peak of 100 items {small} MiB, of 10,000 items {large} MiB")
    # Names and paths of 10,000 items are a few MiB; one mask or cache kept for each would be hundreds.
    assert large - small < 40, f"{small} MiB for 100 items, {large} MiB for 10,000"
