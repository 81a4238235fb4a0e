"""`masked-loss crop`: pictures, masks and captions cut to the masks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from masked_loss_triton.cache.crop_folder import Cropped, Cropping

HELP = "Cut pictures to their masks, in the shapes of the trainer's buckets, so that its own crop cuts nothing off."
EXAMPLE = (
    "masked-loss crop --images photos --masks masks --output crops --resolution 960 544\n"
    "  masked-loss crop --images photos --masks masks --output crops --resolution 1024 --zoom face,half,full"
)


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
    parser.add_argument(
        "--zoom",
        nargs="+",
        default=[],
        metavar="ZOOM",
        help="several crops of each picture, NAME_ZOOM: a label (face) close up, half (the upper half of the subject), full",
    )
    parser.add_argument(
        "--mask_labels",
        nargs="+",
        default=[],
        metavar="LABEL",
        help="labels whose masks, NAME.LABEL.png, are cropped too (with --zoom: all that are there)",
    )


def run(args: argparse.Namespace) -> int:
    from masked_loss_triton.cache.crop_folder import crop_folder
    from masked_loss_triton.files.folders import check_folder_is_writable
    from masked_loss_triton.files.locks import folder_lock
    from masked_loss_triton.files.progress import Progress, printable
    from masked_loss_triton.masks.listing import list_pictures
    from masked_loss_triton.masks.reading import unread_text

    cropping = _cropping(args)
    listing = list_pictures(cropping.images, (cropping.masks, cropping.output))
    check_folder_is_writable(cropping.output, "--output")
    done: list[Cropped] = []
    with folder_lock(cropping.output, "masked-loss crop"), Progress("crop", len(listing.files)) as progress:
        for crops in crop_folder(cropping, listing.files):
            done += crops
            progress.advance()
        problems = sorted([*listing.problems.values(), *(one.message for one in done if one.status == "problem")])
        for message in problems:
            progress.say(f"masked-loss crop: {message}")
    written = [one for one in done if one.status == "written"]
    present = sum(one.status == "present" for one in done)
    there = f", {present} already there" if present else ""
    print(printable(f"{len(written)} crops written to {args.output}{there}, {len(problems)} problems"))
    for line in _remarks(done):
        print(printable(line))
    if listing.unread:
        print(f"Skipped: {unread_text(listing.unread)}")
    return 1 if problems else 0


def _cropping(args: argparse.Namespace) -> Cropping:
    from pathlib import Path

    from masked_loss_triton.cache.crop_folder import Cropping
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.masks.labels import parse_labels
    from masked_loss_triton.masks.zooms import parse_zooms

    if len(args.resolution) > 2:
        raise UserError("--resolution must be one number or two", 2)
    try:
        labels = parse_labels(" ".join(args.mask_labels))
    except ValueError as error:
        raise UserError(f"--mask_labels: {error}", 2) from error
    return Cropping(
        images=Path(args.images),
        masks=Path(args.masks),
        output=Path(args.output),
        resolution=(args.resolution[0], args.resolution[-1]),
        step=args.bucket_step,
        margin=args.margin,
        captions=args.captions,
        zooms=parse_zooms(" ".join(args.zoom)),
        labels=labels,
    )


def _remarks(done: list[Cropped]) -> Iterator[str]:
    """What there is to say of crops that are no problem, by the names of the pictures."""
    for one in sorted(done, key=lambda one: (one.file, one.zoom)):
        name = f"{one.file} ({one.zoom})" if one.zoom else str(one.file)
        if one.status == "absent":
            yield f"{one.file} has no {one.zoom}: no such crop"
        elif one.beyond:
            yield f"{name}: no bucket is as long as its mask: the crop goes on beyond the picture, masked black"
        elif one.enlarged > 1.5:
            yield f"{name}: enlarged {one.enlarged:.1f} times: a larger picture would be sharper"
