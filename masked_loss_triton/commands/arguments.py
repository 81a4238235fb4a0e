"""Command-line flags that cache, check and inspect share; the mask flags have the names of the dataset file's keys."""

from __future__ import annotations

import argparse
from typing import Any

from masked_loss_triton.cache.dataset import MASK_KEYS, Dataset, load_datasets
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.errors import UserError


def add_workers_argument(parser: Any, text: str = "threads (default: four per core, at most 16)") -> None:
    """--workers: None, or at least 1."""

    def at_least_one(text: str) -> int:
        number = int(text)
        if number < 1:
            raise argparse.ArgumentTypeError(f"must be 1 or more, got {text}")
        return number

    parser.add_argument("--workers", type=at_least_one, metavar="N", help=text)


def add_dataset_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--dataset_config, --mask_config, --arch and the mask flags."""
    parser.add_argument("--dataset_config", required=required, metavar="TOML", help="the trainer's dataset file")
    parser.add_argument(
        "--mask_config",
        metavar="TOML",
        help="a second file with the mask keys, [general] and [[datasets]] in the same order: the trainer refuses keys "
        "that it does not know",
    )
    parser.add_argument(
        "--arch", choices=sorted(FAMILIES), help="the model family of the caches (default: of those that are there)"
    )
    sources = parser.add_argument_group("where masks are, in this order (also keys of the dataset file)")
    switch: Any = argparse.BooleanOptionalAction
    sources.add_argument("--alpha_mask", action=switch, default=None, help="the alpha channel is the mask")
    sources.add_argument(
        "--masks",
        dest="mask_directory",
        metavar="DIR",
        help="masks by file stem; for clips a still, a folder of frames or a video (the key mask_directory)",
    )
    sources.add_argument(
        "--mask_labels",
        nargs="+",
        metavar="LABEL",
        help="labels whose masks stand there too, as NAME.LABEL.png; where they overlap the first one wins",
    )
    sources.add_argument("--default_mask", metavar="FILE", help="mask of everything that has none")
    sources.add_argument("--require_mask", action=switch, default=None, help="no mask is a problem, not full weight")
    pixels = parser.add_argument_group("what is done to them, in this order (also keys of the dataset file)")
    pixels.add_argument("--mask_dilate", type=int, metavar="PIXELS", help="grow the mask; negative shrinks it")
    pixels.add_argument("--mask_blur", type=float, metavar="0..0.05", help="Gaussian, fraction of the smaller side")
    pixels.add_argument(
        "--mask_blur_random", action=switch, default=None, help="draw each item's blur between 0 and --mask_blur"
    )
    pixels.add_argument("--mask_seed", type=int, metavar="N", help="seed of that draw")
    pixels.add_argument("--mask_time", choices=("mean", "max"), help="over the frames of one latent frame")
    pixels.add_argument(
        "--mask_bake_invert", action=switch, default=None, help="1 - mask in the cache; items without mask stay full"
    )
    pixels.add_argument(
        "--mask_bake_gamma", type=float, metavar="G", help="gamma in the cache; else it stays at training time"
    )
    pixels.add_argument(
        "--mask_bake_min_weight", type=float, metavar="U", help="floor in the cache; else it stays at training time"
    )


def datasets_from(args: argparse.Namespace, need_source: bool = True) -> list[Dataset]:
    """The datasets that the flags describe.

    Raises:
        UserError: for a faulty file, and where nothing says where masks are although `need_source`.
    """
    flags = {key: getattr(args, key) for key in MASK_KEYS}
    datasets = load_datasets(args.dataset_config, args.mask_config, flags)
    if need_source and not any(dataset.has_mask_source for dataset in datasets):
        raise UserError(
            "nothing says where the masks are: give --alpha_mask, --masks or --default_mask, or the keys "
            "in the dataset file or in --mask_config",
            2,
        )
    return datasets
