"""`masked-loss generate`: a mask for every picture and clip, from words."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from masked_loss_triton.generate.jobs import Job
    from masked_loss_triton.generate.prompts import Options
    from masked_loss_triton.generate.summary import Summary

HELP = (
    "Make a mask for every picture and clip, from words: Florence-2 finds, SAM 2 cuts out; or GrabCut, without weights."
)
EXAMPLE = (
    'masked-loss generate --input_dir photos --output_dir masks --text_prompt "person"\n'
    '  masked-loss generate --input_dir photos --output_dir masks --text_prompt "face=1.0" "body=0.5" --exclude_prompt "hand"\n'
    "  masked-loss generate --input_dir photos --output_dir masks --backend grabcut"
)
# What decides the contents of a mask, beside the flags of its detector and segmenter.
NOTED = (
    *("backend", "text_prompt", "exclude_prompt", "select", "min_score", "min_mask_score", "min_size", "no_detection"),
    *("padding", "blur", "invert", "dtype", "key_interval"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from masked_loss_triton.generate.backends import DEFAULT, DETECTORS, SEGMENTERS, add_backend_arguments
    from masked_loss_triton.generate.prompts import CENTRAL_BOX, SELECTIONS

    parser.add_argument(
        "--input_dir", required=True, metavar="DIR", help="pictures and clips; sub-folders are mirrored"
    )
    parser.add_argument(
        "--output_dir", required=True, metavar="DIR", help="the masks, named as `masked-loss cache` reads them"
    )
    parser.add_argument(
        "--backend",
        default=DEFAULT,
        metavar="NAME",
        help=f"DETECTOR+SEGMENTER of {', '.join(DETECTORS)} and {', '.join(SEGMENTERS)} (default {DEFAULT}); "
        "grabcut is box+grabcut: it needs no weights and reads no words",
    )
    what = parser.add_argument_group("what is found")
    what.add_argument(
        "--text_prompt",
        nargs="+",
        default=[],
        metavar="WORDS[=WEIGHT]",
        help="each is a layer with its grey value, white without a weight; where layers overlap the highest wins",
    )
    what.add_argument(
        "--exclude_prompt", nargs="+", default=[], metavar="WORDS", help="black, whatever the prompts say"
    )
    what.add_argument(
        "--select", choices=SELECTIONS, default="all", help="which instances of a prompt: all (default), or one"
    )
    what.add_argument(
        "--reference_box",
        nargs=4,
        type=float,
        default=CENTRAL_BOX,
        metavar=("L", "T", "R", "B"),
        help="fractions of the picture: what --select nearest is nearest to, and what the detector box finds",
    )
    what.add_argument("--min_score", type=float, default=0.0, metavar="0..1", help="of the detector, for an instance")
    what.add_argument("--min_mask_score", type=float, default=0.0, metavar="0..1", help="of the segmenter")
    what.add_argument("--min_size", type=float, default=0.0, metavar="0..1", help="share of the picture's area")
    what.add_argument(
        "--no_detection",
        choices=("none", "black", "white"),
        default="none",
        help="the mask where nothing was found: no mask (default; an older one is deleted), nothing or everything learned",
    )
    pixels = parser.add_argument_group("what is done to the mask, in this order")
    pixels.add_argument("--padding", type=int, default=0, metavar="PIXELS", help="grow it; negative shrinks it")
    pixels.add_argument(
        "--blur", type=float, default=0.0, metavar="0..0.05", help="Gaussian, fraction of the smaller side"
    )
    pixels.add_argument("--invert", action="store_true", help="white where nothing was found")
    clips = parser.add_argument_group("clips")
    clips.add_argument(
        "--key_interval",
        type=int,
        default=24,
        metavar="N",
        help="look for things every N frames (24), follow in between",
    )
    clips.add_argument(
        "--clip_output", choices=("frames", "video"), default="frames", help="a folder of PNGs, or one lossless video"
    )
    work = parser.add_argument_group("how")
    work.add_argument("--batch_size", type=int, default=4, metavar="N", help="pictures for the models at once (4)")
    work.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto takes the first there is")
    work.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the models; auto is bfloat16 on a GPU that has it, else float32",
    )
    work.add_argument("--overwrite", action="store_true", help="make masks that are there already as well")
    work.add_argument("--strict", action="store_true", help="exit status 1 when nothing was found in some of them")
    work.add_argument(
        "--sheet", metavar="NAME", help="contact sheet NAME.png and NAME.html (default: OUTPUT_DIR_sheet)"
    )
    work.add_argument("--sheet_limit", type=int, default=48, metavar="N", help="items on it (48); 0 draws none")
    add_backend_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from masked_loss_triton.errors import UserError
    from masked_loss_triton.generate.jobs import clear_leftovers, find_jobs
    from masked_loss_triton.generate.summary import Summary

    options = _options(args)
    for flag, least in (("batch_size", 1), ("key_interval", 1), ("sheet_limit", 0)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag} must be {least} or more, got {getattr(args, flag)}", 2)
    output = Path(args.output_dir)
    jobs, problems = find_jobs(Path(args.input_dir), output, ".mkv" if args.clip_output == "video" else "")
    if not jobs and not problems:
        raise UserError(f"--input_dir {args.input_dir} has no pictures or clips in it", 2)
    clear_leftovers(output)
    summary = Summary()
    for problem in problems:
        summary.problem(problem)
    pending = [job for job in jobs if args.overwrite or job.existing() is None]
    settings = _settings(args)
    summary.keep([job for job in jobs if not args.overwrite and job not in set(pending)], settings)
    if pending:
        _make(args, options, settings, pending, summary)
    if args.sheet_limit and jobs:
        _draw(args, jobs, summary)
    summary.show()
    return 1 if summary.problems or (args.strict and summary.nothing) else 0


def _make(args: argparse.Namespace, options: Options, settings: dict[str, Any], jobs: list[Job], to: Summary) -> None:
    from masked_loss_triton.files.parallel import run_parallel
    from masked_loss_triton.files.progress import Progress
    from masked_loss_triton.generate.backends import load_backend
    from masked_loss_triton.generate.engine import Engine
    from masked_loss_triton.generate.work import FALLBACKS, Worker

    detector, segmenter = load_backend(args, options)
    worker = Worker(
        Engine(detector, segmenter, options, args.key_interval), settings, FALLBACKS[args.no_detection], args.debug
    )
    with Progress("generate", len(jobs)) as progress:
        for outcomes in run_parallel(worker.run, _batches(jobs, args.batch_size), segmenter.workers):
            for outcome in outcomes:
                to.add(outcome, progress.say)
            progress.advance(len(outcomes))
    to.rate = progress.rate


def _batches(jobs: list[Job], size: int) -> Iterator[list[Job]]:
    """Pictures by `size`, each clip alone, in the order of the jobs."""
    batch: list[Job] = []
    for job in jobs:
        if job.is_clip:
            yield [job]
            continue
        batch.append(job)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _draw(args: argparse.Namespace, jobs: list[Job], to: Summary) -> None:
    from pathlib import Path

    from masked_loss_triton.generate.sheet import write_sheet

    # Beside the masks, not among them: there it would be the mask of a picture called sheet.
    output = Path(args.output_dir)
    name = Path(args.sheet) if args.sheet else output.with_name(f"{output.name}_sheet")
    shown = write_sheet(name, jobs, args.sheet_limit, f"Masks of {args.input_dir}")
    if shown:
        to.sheet = f"{name}.png and {name}.html show {shown} of {len(jobs)}"


def _options(args: argparse.Namespace) -> Options:
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.generate.backends import split_backend
    from masked_loss_triton.generate.prompts import Options, parse_prompts

    detector, _ = split_backend(args.backend)
    texts = args.text_prompt
    if detector == "box":
        if len(texts) > 1 or args.exclude_prompt:
            raise UserError(
                f"--backend {args.backend} reads no words, only --reference_box: give one prompt or none, and exclude nothing",
                2,
            )
        texts = texts or ["subject"]
    elif not texts:
        raise UserError('say what to look for: --text_prompt "person"', 2)
    prompts, exclude = parse_prompts(texts, args.exclude_prompt)
    return Options(
        prompts=prompts,
        exclude=exclude,
        select=args.select,
        reference_box=tuple(args.reference_box),
        min_score=args.min_score,
        min_mask_score=args.min_mask_score,
        min_size=args.min_size,
        padding=args.padding,
        blur=args.blur,
        invert=args.invert,
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What is noted in each mask; flags of other backends than the one that is used do not count."""
    from pathlib import Path

    from masked_loss_triton.generate.backends import split_backend

    flags = tuple(f"{name}_" for name in split_backend(args.backend))
    settings: dict[str, Any] = {}
    for key, value in sorted(vars(args).items()):
        if key in NOTED or key.startswith(flags):
            # A folder of weights by its name: where it lies on this machine is nobody's business.
            settings[key] = Path(value).name if key.endswith("_model") and Path(value).is_dir() else value
    return {**settings, "reference_box": list(args.reference_box)}
