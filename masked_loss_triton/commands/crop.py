"""`masked-loss crop`: pictures, masks and captions cut to the masks."""

from __future__ import annotations

import argparse

HELP = "Cut pictures to their masks, in the shapes of the trainer's buckets, so that its own crop cuts nothing off."
EXAMPLE = "masked-loss crop --images photos --masks masks --output crops --resolution 960 544"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, metavar="DIR", help="the pictures; sub-folders are mirrored")
    parser.add_argument("--masks", required=True, metavar="DIR", help="their masks, by stem")
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="gets the folders images, with the captions, and masks"
    )
    parser.add_argument(
        "--resolution",
        required=True,
        nargs="+",
        type=int,
        metavar="PIXELS",
        help="as in the dataset file: width and height, or one number for both",
    )
    parser.add_argument("--bucket_step", type=int, default=16, metavar="PIXELS", help="of the family's buckets (16)")
    parser.add_argument(
        "--margin", type=float, default=0.1, metavar="0..2", help="around the mask, of its longer side (0.1)"
    )
    parser.add_argument("--captions", default=".txt", metavar="EXTENSION", help="caption files to copy (.txt)")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from masked_loss_triton.cache.crop_folder import Cropping, crop_folder
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.folders import check_folder_is_writable
    from masked_loss_triton.files.locks import folder_lock
    from masked_loss_triton.files.progress import Progress, printable
    from masked_loss_triton.masks.reading import unread_text
    from masked_loss_triton.masks.to_alpha import Conversion, find_pictures

    if len(args.resolution) > 2:
        raise UserError("--resolution must be one number or two", 2)
    cropping = Cropping(
        images=Path(args.images),
        masks=Path(args.masks),
        output=Path(args.output),
        resolution=(args.resolution[0], args.resolution[-1]),
        step=args.bucket_step,
        margin=args.margin,
        captions=args.captions,
    )
    files, same, unread = find_pictures(Conversion(images=cropping.images, masks=cropping.masks, out=cropping.output))
    check_folder_is_writable(cropping.output, "--output")
    done = []
    with folder_lock(cropping.output, "masked-loss crop"), Progress("crop", len(files)) as progress:
        for one in crop_folder(cropping, files):
            done.append(one)
            progress.advance()
        problems = sorted([one.message for one in same] + [one.message for one in done if one.status == "problem"])
        for message in problems:
            progress.say(f"masked-loss crop: {message}")
    written = [one for one in done if one.status == "written"]
    present = sum(one.status == "present" for one in done)
    there = f", {present} already there" if present else ""
    print(printable(f"{len(written)} crops written to {args.output}{there}, {len(problems)} problems"))
    for one in sorted(written, key=lambda one: one.file):
        if one.beyond:
            print(
                printable(
                    f"{one.file}: no bucket is as long as its mask: the crop goes on beyond the picture, masked black"
                )
            )
        elif one.enlarged > 1.5:
            print(printable(f"{one.file}: enlarged {one.enlarged:.1f} times: a larger picture would be sharper"))
    if unread:
        print(f"Skipped: {unread_text(unread)}")
    return 1 if problems else 0
