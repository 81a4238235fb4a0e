"""`masked-loss inspect`: a contact sheet of pictures, masks and final weights, as PNG and as one HTML file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masked_loss_triton.config import MaskedLossConfig

HELP = "Draw a contact sheet of pictures, masks and the weights that training will use."
EXAMPLE = (
    "masked-loss inspect --dataset_config dataset.toml --masks masks --mask_min_weight 0.05 --output sheet\n"
    "  masked-loss inspect --cache cache_folder --output sheet"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from masked_loss_triton.commands.arguments import add_dataset_arguments

    parser.add_argument(
        "--cache", nargs="+", metavar="PATH", help="latent caches or folders of them, without a dataset"
    )
    add_dataset_arguments(parser, required=False)
    parser.add_argument("--output", required=True, metavar="NAME", help="writes NAME.png and NAME.html")
    parser.add_argument(
        "--sheet_limit",
        type=int,
        default=48,
        metavar="N",
        help="at most so many items, evenly chosen (48); sheets hold 48: with more, NAME_2.png and .html follow",
    )
    options = parser.add_argument_group("options of the loss, as at training time")
    options.add_argument("--invert_mask", action="store_true")
    options.add_argument("--mask_blur_kernel_size", type=int, default=0, metavar="K")
    options.add_argument("--mask_gamma", type=float, default=1.0, metavar="G")
    options.add_argument("--mask_min_weight", type=float, default=0.0, metavar="U")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from masked_loss_triton.cache.cards import find_cache_cards, find_cards, write_sheets
    from masked_loss_triton.cache.families import FAMILIES
    from masked_loss_triton.cache.inject import prepare
    from masked_loss_triton.cache.items import choose_family
    from masked_loss_triton.commands.arguments import datasets_from
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.progress import Progress

    if bool(args.cache) == bool(args.dataset_config):
        raise UserError("give --cache or --dataset_config", 2)
    if args.sheet_limit < 1:
        raise UserError(f"--sheet_limit must be 1 or more, got {args.sheet_limit}", 2)
    config = _config(args)
    if args.cache:
        makers = find_cache_cards(map(Path, args.cache))
    else:
        datasets = datasets_from(args, need_source=False)
        family = FAMILIES[choose_family(datasets, args.arch)]
        makers = find_cards([prepare(dataset, family) for dataset in datasets])
    if not makers:
        raise UserError("nothing to show: no pictures and no latent caches were found")
    total = len(makers)
    if total > args.sheet_limit:
        makers = [makers[index * total // args.sheet_limit] for index in range(args.sheet_limit)]
    options = f"invert {str(config.invert).lower()}, blur {config.blur_kernel_size}, gamma {config.gamma:g}, "
    notes = [
        f"{len(makers)} of {total} items. Weights after {options}minimum weight {config.min_weight:g}.",
        "Full colour is learned with weight 1, dark red with weight 0.",
    ]
    title = f"Masks of {args.dataset_config or ', '.join(args.cache)}"
    with Progress("inspect", len(makers)) as progress:

        def failed(line: str) -> None:
            progress.say(f"masked-loss inspect: {line}")

        sheets, shown = write_sheets(
            Path(args.output), title, makers, config, notes, failed=failed, advance=progress.advance, debug=args.debug
        )
    if not sheets:
        raise UserError("nothing to show: every item has a problem")
    more = f", and {len(sheets) - 1} more sheets to {sheets[-1]}.html" if sheets[1:] else ""
    print(f"{sheets[0]}.png and {sheets[0]}.html{more}: {shown} of {total} items, {len(makers) - shown} problems")
    return 1 if shown < len(makers) else 0


def _config(args: argparse.Namespace) -> MaskedLossConfig:
    from masked_loss_triton.config import MaskedLossConfig
    from masked_loss_triton.errors import UserError

    try:
        return MaskedLossConfig(
            invert=args.invert_mask,
            blur_kernel_size=args.mask_blur_kernel_size,
            gamma=args.mask_gamma,
            min_weight=args.mask_min_weight,
        )
    except ValueError as error:
        raise UserError(str(error), 2) from error
