"""The caches that musubi-tuner writes, latents and text, with the masks that `masked-loss cache` adds, as training samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_families import Family
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from masked_loss_triton.cache.items import CACHE_NAME, CLIP_NAME, LATENT_KEY
from masked_loss_triton.cache.safetensors_file import read_header
from masked_loss_triton.errors import UserError

WAN_TEXT_TOKENS, WAN_TEXT_WIDTH = 512, 4096


@dataclasses.dataclass(frozen=True)
class Item:
    """One latent cache, its text cache, and the keys of what is read; `shape` is (F, h, w)."""

    path: Path
    text: Path
    latents: str
    mask: str | None
    shape: tuple[int, int, int]


def find_items(folders: Sequence[Path], family: Family, use_masks: bool) -> list[Item]:
    """The latent caches of a family in some cache folders, sorted by name.

    Raises:
        UserError: naming the folder or file, where there is no cache, no text for it, or, with `use_masks`, no mask in it.
    """
    items = []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--cache {folder} is not a folder", 2)
        for path in sorted(folder.glob(f"*_{family.suffix}.safetensors")):
            match = CACHE_NAME.fullmatch(path.name)
            if match is not None and match["suffix"] == family.suffix:
                items.append(_item(path, match["stem"], family, use_masks))
    if not items:
        names = ", ".join(map(str, folders))
        raise UserError(
            f"{names}: no latent cache, *_{family.suffix}.safetensors: run the trainer's caching scripts first"
        )
    return items


def _item(path: Path, stem: str, family: Family, use_masks: bool) -> Item:
    file = read_header(path)
    found = [match for name in file.tensors if (match := LATENT_KEY.fullmatch(name))]
    if len(found) != 1:
        raise UserError(f"{path} has no latents in it: delete it and run the caching script again")
    key = found[0].group()
    shape = (int(found[0]["frames"]), int(found[0]["height"]), int(found[0]["width"]))
    if file.tensors[key]["shape"] != [16, *shape]:
        raise UserError(f"{path}: latents must be (16, F, h, w) as its key says, got {file.tensors[key]['shape']}")
    extra = [name for name in file.tensors if name.startswith(("latents_image", "latents_control", "clip"))]
    if extra:
        raise UserError(
            f"{path} is a cache for image-to-video or editing ({extra[0]}), which this example does not train"
        )
    mask = _mask_of(path, file.tensors, family, shape) if use_masks else None
    return Item(path, _text_of(path, stem, family), key, mask, shape)


def _mask_of(path: Path, tensors: dict[str, Any], family: Family, shape: tuple[int, int, int]) -> str:
    masks = [name for name in tensors if name.startswith("mask_weights_")]
    command = f"masked-loss cache --dataset_config DATASET.toml --arch {family.name}"
    if not masks:
        raise UserError(f"{path} has no mask: run `{command}`, or train without masks with --ignore_masks")
    if len(masks) > 1 or tensors[masks[0]]["shape"] != [1, *shape]:
        raise UserError(f"{path}: {', '.join(masks)} does not fit latents of {shape}: run `{command} --force`")
    return masks[0]


def _text_of(path: Path, stem: str, family: Family) -> Path:
    stems = [stem]
    if clip := CLIP_NAME.fullmatch(stem):
        stems.append(clip["stem"])  # the windows of a clip share its caption
    candidates = [path.with_name(f"{name}_{family.suffix}_te.safetensors") for name in stems]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise UserError(f"{path} has no text cache, {candidates[-1].name}: run {family.text_script} first")


class CachedLatents(Dataset[dict[str, Any]]):
    """Samples by (index of the item, number of the draw). The draw alone decides noise, sigma and gate, so that they do not
    depend on how many processes share the work.

    Args:
        items: of `find_items`.
        family: of the items.
        seed: of the draws.
        shift: of the noise levels: sigma = shift u / (1 + (shift - 1) u), u logit-normal.
        sigma_range: noise levels outside it are drawn again.
        mask_probability: how often a sample trains with its mask; otherwise all of it counts.
    """

    def __init__(
        self,
        items: Sequence[Item],
        family: Family,
        *,
        seed: int,
        shift: float,
        sigma_range: tuple[float, float] = (0.0, 1.0),
        mask_probability: float = 1.0,
    ) -> None:
        self.items, self.family, self.seed = items, family, seed
        self.shift, self.sigma_range, self.mask_probability = shift, sigma_range, mask_probability

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, draw = key
        item = self.items[index]
        tensors = _read(item.path, [item.latents] + ([item.mask] if item.mask else []))
        latents = tensors[item.latents].float() * self.family.latent_scale  # (16, F, h, w)
        seed = np.random.SeedSequence([self.seed, draw]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        return {
            "latents": latents,
            "noise": torch.randn(latents.shape, generator=generator),
            "sigma": self._sigma(generator),
            "mask_gate": torch.rand((), generator=generator) < self.mask_probability,
            "mask": tensors[item.mask] if item.mask else None,  # (1, F, h, w)
            "text": _text(item.text, self.family),
        }

    def _sigma(self, generator: torch.Generator) -> Tensor:
        while True:
            u = torch.sigmoid(torch.randn((), generator=generator))
            sigma = self.shift * u / (1 + (self.shift - 1) * u)
            if self.sigma_range[0] <= sigma <= self.sigma_range[1]:
                return sigma


def _read(path: Path, keys: Sequence[str] | None = None) -> dict[str, Tensor]:
    read_header(path)  # its errors name the file and what is wrong with it
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in keys or file.keys()}


def _text(path: Path, family: Family) -> dict[str, Tensor]:
    """ "embeds" of the words (S, D); for HunyuanVideo also "mask" (S,), and "pooled" (D',)."""
    stored = _read(path)
    # Keys end in the dtype, but for the mask of HunyuanVideo's words.
    tensors = {name if name == "llm_mask" else name.rpartition("_")[0]: value for name, value in stored.items()}
    names = {"embeds": family.text_key}
    if family.name == "hv":
        names.update(mask="llm_mask", pooled="clipL")
    for key in names.values():
        if key not in tensors:
            raise UserError(f"{path} has no {key} in it: delete it and run {family.text_script} again")
    return {name: tensors[key] for name, key in names.items()}


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stacks samples of one shape; `mask` becomes (B, 1, F, h, w), or None."""
    stacked = ("latents", "noise", "sigma", "mask_gate")
    batch: dict[str, Any] = {name: torch.stack([sample[name] for sample in samples]) for name in stacked}
    has_mask = samples[0]["mask"] is not None
    batch["mask"] = torch.stack([sample["mask"] for sample in samples]) if has_mask else None
    batch["text"] = _collate_text([sample["text"] for sample in samples])
    return batch


def _collate_text(texts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    if "pooled" in texts[0]:
        batch = {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
        return {**batch, "mask": batch["mask"].bool()}
    lengths = [len(text["embeds"]) for text in texts]
    width = texts[0]["embeds"].shape[1]
    # WAN was trained with this many tokens, zeros after the words and no mask over them.
    length = WAN_TEXT_TOKENS if width == WAN_TEXT_WIDTH else max(lengths)
    embeds = texts[0]["embeds"].new_zeros(len(texts), length, width)
    for row, text in zip(embeds, texts, strict=True):
        row[: len(text["embeds"])] = text["embeds"]
    return {"embeds": embeds, "mask": torch.arange(length) < torch.tensor(lengths).unsqueeze(1)}


class Batches(Sampler[list[tuple[int, int]]]):
    """The batches of one process, without end: epoch after epoch, shuffled, each batch of one shape.

    All processes walk through the same list, and process r takes the r-th of every `processes` batches: two processes with
    one batch each see in a step what one process sees in two micro-batches, or in one batch of twice the size.
    """

    def __init__(self, items: Sequence[Item], batch_size: int, seed: int, process: int = 0, processes: int = 1) -> None:
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self.process, self.processes = process, processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draw = 0
        for number, batch in enumerate(self._all()):
            if number % self.processes == self.process:
                yield [(index, draw + position) for position, index in enumerate(batch)]
            draw += len(batch)

    def _all(self) -> Iterator[list[int]]:
        random = np.random.default_rng(self.seed)
        while True:
            waiting: dict[tuple[int, int, int], list[int]] = {}
            for index in random.permutation(len(self.items)).tolist():
                batch = waiting.setdefault(self.items[index].shape, [])
                batch.append(index)
                if len(batch) == self.batch_size:
                    yield waiting.pop(self.items[index].shape)
            yield from waiting.values()
