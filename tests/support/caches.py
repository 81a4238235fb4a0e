"""A cache folder of each family: the names, keys and shapes that musubi-tuner 0.3.4 writes, masks by `masked-loss cache`."""

from pathlib import Path

import torch
from model_families import FAMILIES
from safetensors.torch import save_file

from tests.cache.support import Lab, disc

SIZES = {"a": (128, 128), "b": (128, 128), "c": (128, 128), "d": (160, 120), "e": (128, 128)}
RADII = {
    "a": 0.45,
    "b": 0.12,
    "c": 0.3,
    "d": 0.2,
    "e": 0.25,
}  # b's mask is a fourteenth of a's: an average over micro-batches would show


def add_text(lab: Lab, stem: str, words: int) -> Path:
    """A text cache as the trainer's script writes it. Widths and dtypes were read from real ones."""
    family = next(family for family in FAMILIES.values() if family.suffix == lab.suffix)
    if family.name == "hv":
        mask = (torch.arange(32) < words).long()
        tensors = {
            "clipL_float16": torch.randn(768).half(),
            "llm_float16": torch.randn(32, 4096).half(),
            "llm_mask": mask,
        }
    else:
        width = {"wan": 4096, "qwen": 3584}[family.name]
        tensors = {f"{family.text_key}_bfloat16": torch.randn(words, width).bfloat16()}
    path = lab.cache / f"{stem}_{lab.suffix}_te.safetensors"
    save_file(tensors, path, metadata={"architecture": lab.arch, "caption1": "a caption", "format_version": "1.0.1"})
    return path


def caches(folder: Path, name: str, masks: str = "disc", stems: str = "abcd") -> Lab:
    """Pictures `stems` with caches. masks: "disc", "white" (no mask file: full weight) or "none" (never given one)."""
    torch.manual_seed(5)
    lab = Lab(folder, FAMILIES[name].suffix)
    dtype = torch.float16 if name == "hv" else torch.bfloat16
    for number, stem in enumerate(stems):
        size = SIZES[stem]
        lab.picture(stem, size, mask=disc(size, radius=RADII[stem]) if masks == "disc" else None)
        lab.add_cache(stem, size, dtype=dtype)
        add_text(lab, stem, 5 + number)
    if masks != "none":
        assert lab.run("cache", "--masks", lab.masks) == 0
    return lab
