"""`masked-loss inspect`: a contact sheet of pictures, masks and final weights, as PNG and as one HTML file."""

from __future__ import annotations

import argparse

HELP = "Draw a contact sheet of pictures, masks and the weights that training will use."
EXAMPLE = (
    "masked-loss inspect --dataset_config dataset.toml --arch wan --mask_directory masks --mask_min_weight 0.05 --out sheet\n"
    "  masked-loss inspect --cache cache_folder --out sheet"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from masked_loss_triton.commands.arguments import add_dataset_arguments

    parser.add_argument(
        "--cache", nargs="+", metavar="PATH", help="latent caches or folders of them, without a dataset"
    )
    add_dataset_arguments(parser, required=False)
    parser.add_argument("--out", required=True, metavar="NAME", help="writes NAME.png and NAME.html")
    parser.add_argument("--limit", type=int, default=48, metavar="N", help="at most so many items, evenly chosen (48)")
    options = parser.add_argument_group("options of the loss, as at training time")
    options.add_argument("--invert_mask", action="store_true")
    options.add_argument("--mask_blur_kernel_size", type=int, default=0, metavar="K")
    options.add_argument("--mask_gamma", type=float, default=1.0, metavar="G")
    options.add_argument("--mask_min_weight", type=float, default=0.0, metavar="U")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from masked_loss_triton.cache.families import FAMILIES
    from masked_loss_triton.cache.gather import card_from_cache, card_from_files
    from masked_loss_triton.cache.inject import prepare
    from masked_loss_triton.cache.items import choose_family
    from masked_loss_triton.commands.arguments import datasets_from
    from masked_loss_triton.config import MaskedLossConfig
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.contact_sheet import Card, draw, save_sheet
    from masked_loss_triton.files.progress import Progress

    if bool(args.cache) == bool(args.dataset_config):
        raise UserError("give --cache or --dataset_config", 2)
    if args.limit < 1:
        raise UserError(f"--limit must be 1 or more, got {args.limit}", 2)
    try:
        config = MaskedLossConfig(
            invert=args.invert_mask,
            blur_kernel_size=args.mask_blur_kernel_size,
            gamma=args.mask_gamma,
            min_weight=args.mask_min_weight,
        )
    except ValueError as error:
        raise UserError(str(error), 2) from error

    jobs: list[tuple] = []
    if args.cache:
        for given in map(Path, args.cache):
            files = sorted(given.glob("*.safetensors")) if given.is_dir() else [given]
            jobs += [(card_from_cache, file) for file in files if not file.name.endswith("_te.safetensors")]
    else:
        datasets = datasets_from(args, need_source=False)
        family = FAMILIES[choose_family(datasets, args.arch)]
        for dataset in datasets:
            one = prepare(dataset, family)
            cached = {item.stem for item in one.items}
            jobs += [(card_from_files, one, item) for item in one.items]
            jobs += [(card_from_files, one, source) for stem, source in one.sources.items() if stem not in cached]
    if not jobs:
        raise UserError("nothing to show: no pictures and no latent caches were found")
    total = len(jobs)
    jobs = [jobs[index * total // args.limit] for index in range(args.limit)] if total > args.limit else jobs

    cards: list[Card] = []
    images, problems = [], 0
    with Progress("inspect", len(jobs)) as progress:
        for function, *arguments in jobs:
            try:
                cards.append(function(*arguments, config))
                images.append(draw(cards[-1]))
            except UserError as error:
                problems += 1
                progress.say(f"masked-loss inspect: {error}")
            progress.advance()
    if not cards:
        raise UserError("nothing to show: every item has a problem")
    options = f"invert {config.invert}, blur {config.blur_kernel_size}, gamma {config.gamma:g}, "
    notes = [
        f"{len(cards)} of {total} items. Weights after {options}minimum weight {config.min_weight:g}.",
        "Full colour is learned with weight 1, dark red with weight 0.",
    ]
    save_sheet(Path(args.out), f"Masks of {args.dataset_config or ', '.join(args.cache)}", cards, images, notes)
    print(f"{args.out}.png and {args.out}.html: {len(cards)} of {total} items, {problems} problems")
    return 1 if problems else 0
