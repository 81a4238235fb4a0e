"""`masked-loss captions`: copies of a data set whose captions name other places."""

from __future__ import annotations

import argparse

HELP = (
    "Copy pictures, masks and captions, each copy with another place in its caption, for masked training with a prior."
)
EXAMPLE = 'masked-loss captions --images photos --masks masks --output varied --places "in a meadow" "at sunset"'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", required=True, metavar="DIR", help="the pictures with their captions; sub-folders are mirrored"
    )
    parser.add_argument("--masks", metavar="DIR", help="their masks, by stem, copied as well")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="gets the folders images, with the captions, and masks"
    )
    parser.add_argument(
        "--places",
        required=True,
        nargs="+",
        metavar="PLACE",
        help="what captions say in turn, in place of {place} in them, else behind them; or a text file with one a line",
    )
    parser.add_argument(
        "--variants", type=int, metavar="N", help="copies of each picture (4, or as many as there are places)"
    )
    parser.add_argument("--caption", default="", metavar="TEXT", help="the caption of pictures that have none")
    parser.add_argument("--captions", default=".txt", metavar="EXTENSION", help="of the caption files (.txt)")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.folders import check_folder_is_writable
    from masked_loss_triton.files.locks import folder_lock
    from masked_loss_triton.files.progress import Progress, printable
    from masked_loss_triton.masks.listing import list_pictures
    from masked_loss_triton.masks.reading import unread_text
    from masked_loss_triton.masks.variants import Variation, vary_folder

    places = args.places
    if len(places) == 1 and Path(places[0]).is_file():
        try:
            lines = Path(places[0]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--places {places[0]} cannot be read as UTF-8 text: {error}", 2) from error
        places = [line for line in lines if line.strip()]
    if args.variants is not None and args.variants < 1:
        raise UserError(f"--variants must be 1 or more, got {args.variants}", 2)
    variation = Variation(
        images=Path(args.images),
        masks=None if args.masks is None else Path(args.masks),
        output=Path(args.output),
        places=tuple(places),
        variants=args.variants or 0,
        caption=args.caption,
        captions=args.captions,
    )
    listing = list_pictures(variation.images, [folder for folder in (variation.masks, variation.output) if folder])
    check_folder_is_writable(variation.output, "--output")
    done = []
    with folder_lock(variation.output, "masked-loss captions"), Progress("captions", len(listing.files)) as progress:
        for one in vary_folder(variation, listing.files):
            done.append(one)
            progress.advance()
        problems = sorted([*listing.problems.values(), *(one.message for one in done if one.status == "problem")])
        for message in problems:
            progress.say(f"masked-loss captions: {message}")
    counts = {status: sum(one.status == status for one in done) for status in ("written", "present")}
    there = f", {counts['present']} already there" if counts["present"] else ""
    copies = f"{variation.variants} {'copies' if variation.variants > 1 else 'copy'} each"
    print(printable(f"{counts['written']} pictures copied to {args.output}, {copies}{there}, {len(problems)} problems"))
    example = next((one.example for one in done if one.example), "")
    if example:
        print(printable(f"for example: {example}"))
    if listing.unread:
        print(f"Skipped: {unread_text(listing.unread)}")
    return 1 if problems else 0
