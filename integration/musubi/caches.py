"""Before training: do all latent caches of the dataset carry masks, which, and what was done to them when they were written?"""

from __future__ import annotations

import collections
import dataclasses
import json
import os

from masked_loss_triton.cache.dataset import load_datasets
from masked_loss_triton.cache.families import FAMILIES, Family, family_of
from masked_loss_triton.cache.inject import WEIGHTS_PREFIX
from masked_loss_triton.cache.items import cells_of, find_caches
from masked_loss_triton.cache.safetensors_file import TensorFile, read_header
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi.options import MaskOptions

UNDONE = {"mask_bake_invert": False, "mask_bake_gamma": 1.0, "mask_bake_min_weight": 0.0}


@dataclasses.dataclass(frozen=True)
class CacheReport:
    """The masks of a dataset's caches: how many, from where, and what is baked into them."""

    sources: collections.Counter[str]
    baked: dict[str, set[str]]

    def summary(self) -> str:
        """One line."""
        sources = ", ".join(f"{name} {count}" for name, count in sorted(self.sources.items()))
        baked = ", ".join(f"{name} {'/'.join(sorted(values))}" for name, values in sorted(self.baked.items()))
        return f"masks in {self.sources.total()} caches, from: {sources}" + (f"; baked in: {baked}" if baked else "")

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
        if options.invert_mask and self.sources["full"]:
            found.append(
                f"{self.sources['full']} caches have no mask but full weight, which --invert_mask turns into no weight: run "
                "masked-loss cache with --mask_bake_invert instead, which leaves them alone"
            )
        return found


def inspect_caches(dataset_config: str, suffix: str) -> CacheReport:
    """Reads the headers of all latent caches that the trainer may use; no tensor is read.

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
    sources: collections.Counter[str] = collections.Counter()
    baked: dict[str, set[str]] = {}
    unmasked = []
    for dataset in load_datasets(dataset_config):
        for item in find_caches(dataset, family, {}):
            file = read_header(item.path)
            weights = [key for key in file.tensors if key.startswith(WEIGHTS_PREFIX)]
            if not weights:
                unmasked.append(item.path)
                continue
            if len(weights) > 1 or file.tensors[weights[0]]["shape"] != [1, *cells_of(file, family)]:
                raise UserError(f"{item.path}: {', '.join(weights)} does not fit its latents: run {command}")
            sources[file.metadata.get("mask_source", "another program")] += 1
            for key, value in _baked(file).items():
                baked.setdefault(key, set()).add(value)
    if unmasked:
        total = len(unmasked) + sources.total()
        raise UserError(
            f"{len(unmasked)} of {total} latent caches have no mask, the first is {unmasked[0]}: run {command}; to train "
            "without masks, drop --use_mask_loss"
        )
    if not sources:
        raise UserError(
            f"{os.fspath(dataset_config)}: no {name} latent caches: run the trainer's caching script, then {command}"
        )
    return CacheReport(sources, baked)


def _baked(file: TensorFile) -> dict[str, str]:
    try:
        operations = json.loads(file.metadata.get("mask_operations", "{}"))
    except ValueError:
        return {}
    return {key: str(operations[key]) for key, off in UNDONE.items() if operations.get(key, off) != off}
