"""Before training: do all latent caches of the dataset carry masks, which, and what was done to them when they were written?"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from pathlib import Path

import numpy as np
import torch

from masked_loss_triton.cache.dataset import Dataset, load_datasets
from masked_loss_triton.cache.families import FAMILIES, Family, family_of
from masked_loss_triton.cache.inject import WEIGHTS_PREFIX
from masked_loss_triton.cache.items import LATENT_KEY, cells_of, find_caches
from masked_loss_triton.cache.safetensors_file import TensorFile, read_header
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi.options import MaskOptions
from masked_loss_triton.masks.labels import UNLABELLED, complete_weights, labels_in, labels_key

SAMPLE = 4  # numbers that are looked at in each of eight places of an item's latents
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
UNDONE = {"mask_bake_invert": False, "mask_bake_gamma": 1.0, "mask_bake_min_weight": 0.0}


@dataclasses.dataclass(frozen=True)
class DatasetReport:
    """The masks of one dataset: where they are from, and the sums over its caches of their mean weights and of the mean share of
    each label, where there are labels."""

    dataset: Dataset
    sources: collections.Counter[str]
    covered: float
    labels: dict[str, float]

    @property
    def coverage(self) -> float:
        """The mean weight in its caches, before any option of the loss."""
        return self.covered / self.sources.total()

    def summary(self) -> str:
        """One line."""
        named = {"full": "no mask and full weight"}
        sources = ", ".join(f"{named.get(name, name)} {count}" for name, count in sorted(self.sources.items()))
        total = self.sources.total()
        shares = ", ".join(f"{label} {share / total:.1%}" for label, share in self.labels.items())
        labels = f" ({shares})" if shares else ""
        return f"{self.dataset.name}: masks in {total} caches, from: {sources}; coverage {self.coverage:.1%}{labels}"


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """The masks of the datasets' caches, what is baked into them, and the caches by the sample of their latents."""

    family: Family
    datasets: list[DatasetReport]
    baked: dict[str, set[str]]
    items: dict[bytes, tuple[Dataset, Path]]

    def summary(self) -> list[str]:
        """One line for each dataset, and one for what is baked in."""
        baked = ", ".join(f"{name} {'/'.join(sorted(values))}" for name, values in sorted(self.baked.items()))
        return [*(one.summary() for one in self.datasets), *([f"baked into the caches: {baked}"] if baked else [])]

    def label_factors(self, options: MaskOptions) -> dict[str, float]:
        """The factor of each label, the largest 1; none where no label has a weight of its own.

        Raises:
            UserError: for a label that no cache has.
        """
        if options.mask_weights is None:
            return {}
        shares: dict[str, float] = collections.defaultdict(float)
        labelled = any(one.labels for one in self.datasets)
        for one in self.datasets:
            for label, share in (one.labels or {UNLABELLED: one.covered if labelled else 0.0}).items():
                shares[label] += share
        named = options.label_weights
        there = [label for label, share in shares.items() if share or (label in named and labelled)]
        return complete_weights(named, there, absent=[label for label in there if not shares[label]])

    def warnings(self, options: MaskOptions) -> list[str]:
        """What would be applied twice, or to caches that cannot stand it."""
        found = []
        for flag, baked in (
            ("invert_mask", "mask_bake_invert"),
            ("mask_gamma", "mask_bake_gamma"),
            ("mask_min_weight", "mask_bake_min_weight"),
        ):
            default = MaskOptions.__dataclass_fields__[flag].default
            if baked in self.baked and getattr(options, flag) != default:
                values = "/".join(sorted(self.baked[baked]))
                found.append(
                    f"--{flag} {getattr(options, flag)} comes on top of {baked} {values} in the caches: drop one"
                )
        full = sum(one.sources["full"] for one in self.datasets)
        if options.invert_mask and full:
            found.append(
                f"{full} caches have no mask but full weight, which --invert_mask turns into no weight: run "
                "masked-loss cache with --mask_bake_invert instead, which leaves them alone"
            )
        return found


def inspect_caches(dataset_config: str, suffix: str) -> CacheReport:
    """Reads the headers and the masks of all latent caches that the trainer may use.

    Args:
        dataset_config: the trainer's dataset file.
        suffix: the trainer's short name of its model family, which ends the names of caches.

    Raises:
        UserError: when a cache is damaged, has no mask, or one that does not fit its latents; the first such file is named.
    """
    name = family_of(suffix) or suffix
    known = FAMILIES.get(name, Family(suffixes=(suffix,), fps=None, caching_script=""))
    family = dataclasses.replace(known, suffixes=(suffix,))
    command = f"masked-loss cache --dataset_config {dataset_config} --arch {name} --alpha_mask or --mask_directory DIR"
    report = CacheReport(family, [], {}, {})
    unmasked = []
    for dataset in load_datasets(dataset_config):
        sources: collections.Counter[str] = collections.Counter()
        covered, labels = 0.0, dict[str, float]()
        for item in find_caches(dataset, family, {}):
            file = read_header(item.path)
            weights = [key for key in file.tensors if key.startswith(WEIGHTS_PREFIX)]
            if not weights:
                unmasked.append(item.path)
                continue
            if len(weights) > 1 or file.tensors[weights[0]]["shape"] != [1, *cells_of(file, family)]:
                raise UserError(f"{item.path}: {', '.join(weights)} does not fit its latents: run {command}")
            sources[file.metadata.get("mask_source", "another program")] += 1
            covered += float(file.read(weights[0]).mean(dtype=np.float64))
            names = labels_in(file.metadata)
            if sources.total() > 1 and set(names) != labels.keys():
                there = ", ".join(labels) or "no labels"
                raise UserError(
                    f"{item.path} has the labels {', '.join(names) or 'of none'}, others in its folder {there}: "
                    f"run {command} --mask_labels LABEL ..., the same for all"
                )
            for label, key in ((label, labels_key(label, weights[0])) for label in names):
                if key not in file.tensors:
                    raise UserError(f"{item.path}: no {key} in it, which its header names: run {command} --force")
                labels[label] = labels.get(label, 0.0) + float(file.read(key).mean(dtype=np.float64))
            if sample := _sample_of_file(file):
                report.items[sample] = dataset, item.path
            for key, value in _baked(file).items():
                report.baked.setdefault(key, set()).add(value)
        if sources:
            report.datasets.append(DatasetReport(dataset, sources, covered, labels))
    if unmasked:
        total = len(unmasked) + sum(one.sources.total() for one in report.datasets)
        raise UserError(
            f"{len(unmasked)} of {total} latent caches have no mask, the first is {unmasked[0]}: run {command}; to train "
            "without masks, drop --use_mask_loss"
        )
    if not report.datasets:
        raise UserError(
            f"{os.fspath(dataset_config)}: no {name} latent caches: run the trainer's caching script, then {command}"
        )
    return report


def latents_sample(latents: torch.Tensor) -> bytes:
    """Some numbers of the latents of one item, by which its cache is known again in `CacheReport.items`."""
    flat = latents.detach().reshape(-1)
    return _as_bytes(flat[[at for place in _places(len(flat)) for at in range(place, place + SAMPLE)]])


def _sample_of_file(file: TensorFile) -> bytes | None:
    name = next(name for name in file.tensors if LATENT_KEY.fullmatch(name))
    entry, found = file.tensors[name], b""
    if entry["dtype"] not in DTYPES:
        return None
    dtype, count = DTYPES[entry["dtype"]], math.prod(entry["shape"])
    with file.open() as data:
        for place in _places(count):
            data.seek(file.data_start + entry["data_offsets"][0] + place * dtype.itemsize)
            found += data.read(SAMPLE * dtype.itemsize)
    return _as_bytes(torch.frombuffer(bytearray(found), dtype=dtype))


def _places(count: int) -> list[int]:
    """Where a sample looks among `count` numbers: borders may be the same in many pictures, so not only there."""
    return [max(0, count - SAMPLE) * part // 7 for part in range(8)]


def _as_bytes(numbers: torch.Tensor) -> bytes:
    """In bfloat16: a trainer may give latents another dtype than the cache has."""
    return numbers.cpu().bfloat16().view(torch.int16).numpy().tobytes()


def _baked(file: TensorFile) -> dict[str, str]:
    try:
        operations = json.loads(file.metadata.get("mask_operations", "{}"))
    except ValueError:
        return {}
    return {key: str(operations[key]) for key, off in UNDONE.items() if operations.get(key, off) != off}
