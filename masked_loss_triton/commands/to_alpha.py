"""`masked-loss to-alpha`: pictures and masks to RGBA pictures, and back."""

from __future__ import annotations

import argparse

HELP = "Join a picture folder and a mask folder to RGBA PNGs, or split RGBA pictures into the two."
EXAMPLE = "masked-loss to-alpha --images photos --masks masks --out rgba --captions .txt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, metavar="DIR", help="the pictures (with --split: with alpha)")
    parser.add_argument("--masks", required=True, metavar="DIR", help="the masks, by stem (with --split: written here)")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the pictures are written, as PNG")
    parser.add_argument("--split", action="store_true", help="the other way: RGBA to RGB and mask")
    parser.add_argument(
        "--captions", metavar="EXTENSION", help="copy caption files of this extension, for example .txt"
    )
    parser.add_argument("--force", action="store_true", help="overwrite what is already there")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.parallel import default_workers, run_parallel
    from masked_loss_triton.files.progress import Progress
    from masked_loss_triton.masks.frames import IMAGE_EXTENSIONS, frame_files
    from masked_loss_triton.masks.sources import MaskDirectory
    from masked_loss_triton.masks.to_alpha import Conversion, convert

    images, masks, out = Path(args.images), Path(args.masks), Path(args.out)
    if not images.is_dir():
        raise UserError(f"--images {images} is not a folder", 2)
    if len({folder.resolve() for folder in (images, masks, out)}) < 3:
        raise UserError("--images, --masks and --out must be three folders", 2)
    files = frame_files(images, IMAGE_EXTENSIONS)
    if not files:
        raise UserError(f"--images {images} has no pictures in it", 2)
    try:
        for folder in (out, masks) if args.split else (out,):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give another folder", 2) from error
    stems: dict[str, Path] = {}
    jobs, problems = [], []
    for file in files:
        first = stems.setdefault(file.stem, file)
        if first is file:
            jobs.append(file)
        else:
            problems.append(f"{file} has the same stem as {first.name}: rename one of them")
    conversion = Conversion(
        masks=masks,
        directory=None if args.split else MaskDirectory(masks),
        out=out,
        captions=args.captions,
        force=args.force,
    )
    with Progress("to-alpha", len(jobs)) as progress:
        for problem in run_parallel(lambda file: convert(file, conversion), jobs, default_workers()):
            if problem:
                problems.append(problem)
            progress.advance()
    for problem in sorted(problems):
        progress.say(f"masked-loss to-alpha: {problem}")
    print(f"{len(files) - len(problems)} pictures written to {out}, {len(problems)} problems")
    return 1 if problems else 0
