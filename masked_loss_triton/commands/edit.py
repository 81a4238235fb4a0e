"""`masked-loss edit`: a local page to look at the masks of a data set and mend them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from masked_loss_triton.cache.inject import Prepared
    from masked_loss_triton.edit.entries import Entry

    # The pictures and clips, the same with the masks of each label, the folder of the masks, problems, and the datasets.
    Found = tuple[list[Entry], dict[str, list[Entry]], Path, list[str], list[Prepared]]

HELP = "Look at masks in the browser, see the weights that the loss will use, and mend them."
EXAMPLE = (
    "masked-loss edit --images photos --masks masks\n  masked-loss edit --dataset_config dataset.toml --masks masks"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from masked_loss_triton.commands.arguments import add_dataset_arguments
    from masked_loss_triton.generate import saliency, sam2

    parser.add_argument("--images", metavar="DIR", help="pictures and clips, without a dataset file")
    parser.add_argument(
        "--resolution",
        type=int,
        nargs="+",
        default=[960, 544],
        metavar="PIXELS",
        help="of the training, width and height or one number, without a dataset file (960 544)",
    )
    add_dataset_arguments(parser, required=False)
    page = parser.add_argument_group("the page")
    page.add_argument("--port", type=int, default=0, help="of 127.0.0.1 (default: a free one)")
    page.add_argument(
        "--no_browser", action="store_true", help="print the address only, for a tunnel: ssh -L PORT:127.0.0.1:PORT"
    )
    models = parser.add_argument_group("one click: SAM 2, else U2-Net and GrabCut, else GrabCut alone")
    sam2.add_arguments(models)
    saliency.add_arguments(models)
    page.add_argument("--device", default="auto", help="of SAM 2: cuda, cuda:1, mps, cpu (default: the first there is)")


def run(args: argparse.Namespace) -> int:
    from masked_loss_triton.edit.clicks import Selector
    from masked_loss_triton.edit.library import Library
    from masked_loss_triton.edit.server import Session, serve
    from masked_loss_triton.edit.survey import Survey
    from masked_loss_triton.errors import UserError

    if bool(args.images) == bool(args.dataset_config):
        raise UserError("give --images and --masks, or --dataset_config", 2)
    if args.images and not args.mask_directory:
        raise UserError("--images needs --masks, the folder that masks are in or go to", 2)
    entries, labels, folder, problems, prepared = _of_folders(args) if args.images else _of_dataset(args)
    if not entries:
        raise UserError("nothing to edit: no pictures and no clips were found")
    library = Library(entries, labels)
    selector = Selector(args.sam2_model, args.saliency_model, args.device)
    session = Session(library, Survey(library, folder), selector, _cache_words(args), problems, prepared)
    return serve(session, args.port, browser=not args.no_browser)


def _of_folders(args: argparse.Namespace) -> Found:
    from pathlib import Path

    from masked_loss_triton.cache.families import FAMILIES
    from masked_loss_triton.edit.entries import entries_of_folders
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.folders import check_folder_is_writable
    from masked_loss_triton.masks.labels import parse_labels

    if len(args.resolution) > 2:
        raise UserError(f"--resolution is one number or two, got {len(args.resolution)}", 2)
    images, masks, family = Path(args.images), Path(args.mask_directory), FAMILIES[args.arch or "wan"]
    size = args.resolution[0], args.resolution[-1]
    check_folder_is_writable(masks, "--masks")
    entries, problems = entries_of_folders(images, masks, size, family)
    try:
        names = parse_labels(args.mask_labels or ())
    except ValueError as error:
        raise UserError(f"--mask_labels: {error}", 2) from error
    labels = {name: entries_of_folders(images, masks, size, family, name)[0] for name in names}
    return entries, labels, masks, problems, []


def _of_dataset(args: argparse.Namespace) -> Found:
    from masked_loss_triton.cache.families import FAMILIES
    from masked_loss_triton.cache.inject import prepare
    from masked_loss_triton.cache.items import choose_family
    from masked_loss_triton.commands.arguments import datasets_from
    from masked_loss_triton.edit.entries import entries_of_dataset, mask_folder
    from masked_loss_triton.files.folders import check_folder_is_writable

    datasets = datasets_from(args)
    family = FAMILIES[choose_family(datasets, args.arch)]
    prepared = [prepare(dataset, family) for dataset in datasets]
    for dataset in datasets:
        check_folder_is_writable(mask_folder(dataset), "--masks")
    names = dict.fromkeys(name for dataset in datasets for name in dataset.mask_labels)
    labels = {name: [entry for one in prepared for entry in entries_of_dataset(one, name)] for name in names}
    entries = [entry for one in prepared for entry in entries_of_dataset(one)]
    return entries, labels, mask_folder(datasets[0]), [], prepared


def _cache_words(args: argparse.Namespace) -> list[str] | None:
    """The command line of `masked-loss cache` for the same dataset; None without a dataset file."""
    if not args.dataset_config:
        return None
    from masked_loss_triton.cache.dataset import MASK_KEYS

    words = ["--dataset_config", args.dataset_config]
    words += ["--mask_config", args.mask_config] if args.mask_config else []
    words += ["--arch", args.arch] if args.arch else []
    for key in MASK_KEYS:
        value = getattr(args, key)
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        elif value is not None:
            words += [f"--{key}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words
