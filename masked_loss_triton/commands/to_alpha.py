"""`masked-loss to-alpha`: pictures and masks to RGBA pictures, and back."""

from __future__ import annotations

import argparse

HELP = "Join a picture folder and a mask folder to RGBA PNGs, or split RGBA pictures into the two."
EXAMPLE = "masked-loss to-alpha --images photos --masks masks --output rgba --captions .txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, metavar="DIR", help="the pictures; sub-folders are mirrored")
    parser.add_argument("--masks", required=True, metavar="DIR", help="the masks, by stem (with --split: written here)")
    parser.add_argument("--output", required=True, metavar="DIR", help="where the pictures are written, as PNG")
    parser.add_argument("--split", action="store_true", help="the other way: RGBA to RGB and mask")
    parser.add_argument(
        "--captions", metavar="EXTENSION", help="copy caption files of this extension, for example .txt"
    )
    parser.add_argument(
        "--mask_weights",
        nargs="+",
        metavar="LABEL=WEIGHT",
        help="make the alpha channel of labels, NAME.LABEL.png, with these weights over the largest; where they overlap the "
        "first wins, and what only a plain mask covers is 'unlabelled', of weight 1",
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is already there")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.atomic import remove_leftovers_below
    from masked_loss_triton.files.folders import check_folder_is_writable
    from masked_loss_triton.files.locks import folder_lock
    from masked_loss_triton.files.progress import Progress, printable
    from masked_loss_triton.masks.labels import parse_weights
    from masked_loss_triton.masks.listing import list_pictures
    from masked_loss_triton.masks.reading import unread_text
    from masked_loss_triton.masks.to_alpha import Conversion, Converted, convert_folder

    try:
        weights = parse_weights(" ".join(args.mask_weights or ()))
    except ValueError as error:
        raise UserError(f"--mask_weights {error}", 2) from error
    conversion = Conversion(
        images=Path(args.images),
        masks=Path(args.masks),
        out=Path(args.output),
        split=args.split,
        captions=args.captions,
        force=args.force,
        weights=weights,
    )
    listing = list_pictures(conversion.images, (conversion.masks, conversion.out))
    converted = [Converted(file, "problem", message) for file, message in listing.problems.items()]
    for folder in conversion.written_folders:
        check_folder_is_writable(folder, "--output" if folder == conversion.out else "--masks")
    with (
        folder_lock(conversion.written_folders, "masked-loss to-alpha"),
        Progress("to-alpha", len(listing.files)) as progress,
    ):
        for folder in conversion.written_folders:
            remove_leftovers_below(folder)
        for one in convert_folder(conversion, listing.files):
            converted.append(one)
            progress.advance()
        problems = sorted(one.message for one in converted if one.status == "problem")
        for message in problems:
            progress.say(f"masked-loss to-alpha: {message}")
    present = sum(one.status == "present" for one in converted)
    there = f", {present} already there" if present else ""
    print(
        printable(
            f"{len(converted) - len(problems) - present} pictures written to {args.output}{there}, {len(problems)} problems"
        )
    )
    if listing.unread:
        print(f"Skipped: {unread_text(listing.unread)}")
    return 1 if problems else 0
