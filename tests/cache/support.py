"""A dataset as a user has it: pictures, captions, masks, latent caches in the trainer's format, and its dataset file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from masked_loss_triton.cache.dataset import Dataset, load_datasets
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.items import bucket_size
from masked_loss_triton.cli import main
from masked_loss_triton.masks.geometry import resize_to_bucket, to_latent


class Lab:
    """A folder with one dataset of pictures. Caches have the names, keys and metadata of musubi-tuner 0.3.4."""

    def __init__(self, folder: Path, suffix: str = "wan", resolution: tuple[int, int] = (128, 128)) -> None:
        self.folder, self.suffix, self.resolution = folder, suffix, resolution
        self.images, self.masks, self.cache = folder / "images", folder / "masks", folder / "cache"
        for path in (self.images, self.masks, self.cache):
            path.mkdir(parents=True, exist_ok=True)
        self.toml = folder / "dataset.toml"
        self.write_toml()

    @property
    def arch(self) -> str:
        return next(name for name, one in FAMILIES.items() if self.suffix in one.suffixes)

    def write_toml(self, general: str = "", entry: str = "", kind: str = "image") -> None:
        text = f'[general]\ncaption_extension = ".txt"\nenable_bucket = true\n{general}\n[[datasets]]\n'
        text += f'resolution = [{self.resolution[0]}, {self.resolution[1]}]\n{kind}_directory = "{self.images}"\n'
        self.toml.write_text(text + f'cache_directory = "{self.cache}"\n{entry}\n')

    def dataset(self) -> Dataset:
        return load_datasets(self.toml)[0]

    def picture(self, stem: str, size=(160, 120), mask=None, alpha=None, extension="png") -> Path:
        """A picture with caption; `mask` and `alpha` are arrays, written as a mask file and as the alpha channel."""
        rng = np.random.default_rng(abs(hash(stem)) % 2**32)
        rgb = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        path = self.images / f"{stem}.{extension}"
        Image.fromarray(rgb if alpha is None else np.dstack([rgb, alpha])).save(path)
        path.with_suffix(".txt").write_text("a caption")
        if mask is not None:
            Image.fromarray(mask).save(self.masks / f"{stem}.png")
        return path

    def add_cache(self, stem: str, size=(160, 120), frames=1, cell=8, extra=None, dtype=torch.bfloat16) -> Path:
        """A latent cache of a picture (`size`) or, with a window in `stem`, of a clip (`size` its bucket)."""
        width, height = bucket_size(size, self.dataset(), FAMILIES[self.arch])
        h, w = height // cell, width // cell
        name = str(dtype).removeprefix("torch.")
        named = f"{h}x{w}" if self.arch == "flux2" else f"{frames}x{h}x{w}"
        sizes = {"C": 3 * cell * cell if self.arch == "hidream" else 16, "F": frames, "H": h, "W": w}
        shape = [sizes[axis] for axis in FAMILIES[self.arch].latent_axes]
        tensors = {f"latents_{named}_{name}": torch.randn(shape).to(dtype), **(extra or {})}
        metadata = {"architecture": self.arch, "width": str(size[0]), "height": str(size[1]), "format_version": "1.0.1"}
        path = self.cache / f"{stem}_{size[0]:04d}x{size[1]:04d}_{self.suffix}.safetensors"
        save_file(tensors, path, metadata=metadata)
        return path

    def run(self, command: str, *flags: str | Path) -> int:
        return main([command, "--dataset_config", str(self.toml), "--arch", self.arch, *map(str, flags)])


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata as the safetensors library reads them."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118


def weights(path: Path) -> torch.Tensor:
    """The one mask weights tensor of a cache."""
    tensors, _ = read(path)
    (name,) = [name for name in tensors if name.startswith("mask_weights_")]
    tensor = tensors[name]
    shape = "x".join(str(size) for size in tensor.shape[1:])
    assert name == f"mask_weights_{shape}_{str(tensor.dtype).removeprefix('torch.')}"
    assert tensor.shape[0] == 1
    assert tensor.is_contiguous()
    return tensor[0].float()


def disc(size: tuple[int, int], centre=(0.4, 0.5), radius=0.3) -> np.ndarray:
    """A soft white disc on black, (height, width) uint8."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    distance = np.hypot(x - centre[0] * width, y - centre[1] * height)
    return (np.clip((radius * height - distance) / 6 + 0.5, 0, 1) * 255).astype(np.uint8)


def frames_of(count: int, size: tuple[int, int] = (128, 128)) -> list[np.ndarray]:
    """A disc that moves to the right, one (height, width) uint8 mask for each frame."""
    return [disc(size, (0.2 + 0.6 * t / count, 0.5), 0.2) for t in range(count)]


def video_lab(tmp_path: Path, frames: list[np.ndarray], fps: int = 16, source_fps: float | None = None) -> Lab:
    """A lab with one clip, clip.mp4, that shows the masks themselves. Skips the test where there is no video decoder."""
    av = pytest.importorskip("av")
    lab = Lab(tmp_path)
    lab.write_toml(kind="video", entry=f"source_fps = {source_fps}" if source_fps else "")
    with av.open(str(lab.images / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        stream.options = {"crf": "1"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.repeat(frame[..., None], 3, 2), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return lab


def expected(mask: np.ndarray, bucket: tuple[int, int] = (144, 112)) -> torch.Tensor:
    """The weights of a picture's mask, (h, w), as `cache` writes them in float16."""
    size = (bucket[1] // 8, bucket[0] // 8)
    return torch.from_numpy(to_latent(resize_to_bucket(mask, bucket), size)).half().float()
