"""`masked-loss generate`: a mask for every picture and clip, of what words say or of what stands out."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from masked_loss_triton.files.shard import Shard
    from masked_loss_triton.generate.batches import Generation
    from masked_loss_triton.generate.jobs import Job, Jobs
    from masked_loss_triton.generate.prompts import MaskRequest
    from masked_loss_triton.generate.summary import Summary

HELP = (
    "Make a mask for every picture and clip: of what words say (Florence-2 and SAM 2, or SAM 3), or of what stands out "
    "(U2-Net)."
)
EXAMPLE = (
    "masked-loss generate --images photos --masks masks\n"
    '  masked-loss generate --images photos --masks masks --text_prompt "person"\n'
    '  masked-loss generate --images photos --masks masks --text_prompt "face=1.0" "body=0.5" --exclude_prompt "hand"'
)
# Flags that are fields of MaskRequest and of Generation, by the same name.
REQUEST = ("select", "min_score", "min_mask_score", "min_size", "mask_dilate", "mask_blur", "invert")
GENERATION = ("device", "dtype", "batch_size", "key_interval", "no_detection", "compare", "overwrite", "debug")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from masked_loss_triton.commands.arguments import add_workers_argument
    from masked_loss_triton.commands.farm import add_engine_arguments, add_shard_argument
    from masked_loss_triton.generate.backends import (
        BY_WORDS,
        DEFAULT,
        DETECTORS,
        SEGMENTERS,
        WORDLESS,
        add_backend_arguments,
    )

    parser.add_argument("--images", required=True, metavar="DIR", help="pictures and clips; sub-folders are mirrored")
    parser.add_argument(
        "--masks", required=True, metavar="DIR", help="the masks, named as `masked-loss cache` reads them"
    )
    parser.add_argument(
        "--backend",
        default=DEFAULT,
        metavar="NAME",
        help=f"DETECTOR+SEGMENTER of {', '.join(DETECTORS)} and {', '.join(SEGMENTERS)}, or {' or '.join(BY_WORDS)}; u2net is "
        f"both, grabcut is box+grabcut; {' and '.join(WORDLESS)} read no words (default: florence2+sam2 with words, or sam3 "
        "where only that is there; u2net without)",
    )
    _add_what(parser.add_argument_group("what is found"))
    _add_pixels(parser.add_argument_group("what is done to the mask, in this order"))
    clips = parser.add_argument_group("clips")
    clips.add_argument(
        "--key_interval",
        type=int,
        default=24,
        metavar="N",
        help="look for things every N frames (24), follow in between",
    )
    clips.add_argument(
        "--intervals",
        nargs="+",
        default=[],
        metavar="START-END",
        help="seconds (or M:SS) that count, to the end without END; all other frames are black",
    )
    clips.add_argument(
        "--clip_output", choices=("frames", "video"), default="frames", help="a folder of PNGs, or one lossless video"
    )
    _add_how(parser.add_argument_group("how"))
    machines = parser.add_argument_group("several machines or workers")
    add_shard_argument(machines)
    add_engine_arguments(machines)
    add_workers_argument(machines, "workers of Ray (default: one a GPU where models run on GPUs, else one a core)")
    add_backend_arguments(parser)


def _label(text: str) -> str:
    from masked_loss_triton.masks.labels import parse_labels

    try:
        (label,) = parse_labels([text])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return label


def _add_what(what: Any) -> None:
    from masked_loss_triton.generate.prompts import CENTRAL_BOX, SELECTIONS

    what.add_argument(
        "--text_prompt",
        nargs="+",
        default=[],
        metavar="WORDS[=WEIGHT]",
        help="each is a layer with its grey value, white without a weight; where layers overlap the highest wins",
    )
    what.add_argument(
        "--label",
        metavar="LABEL",
        type=_label,
        help="the masks are those of a label: NAME.LABEL.png, which `masked-loss cache --mask_labels` reads",
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
    what.add_argument(
        "--min_score", type=float, default=0.0, metavar="0..1", help="of the detector, for an instance (sam3: 0.5)"
    )
    what.add_argument("--min_mask_score", type=float, default=0.0, metavar="0..1", help="of the segmenter")
    what.add_argument("--min_size", type=float, default=0.0, metavar="0..1", help="share of the picture's area")
    what.add_argument(
        "--no_detection",
        choices=("none", "black", "white"),
        default="none",
        help="the mask where nothing was found: no mask (default; an older one is deleted), nothing or everything learned",
    )


def _add_pixels(pixels: Any) -> None:
    pixels.add_argument("--mask_dilate", type=int, default=0, metavar="PIXELS", help="grow it; negative shrinks it")
    pixels.add_argument(
        "--mask_blur", type=float, default=0.0, metavar="0..0.05", help="Gaussian, fraction of the smaller side"
    )
    pixels.add_argument("--invert", action="store_true", help="white where nothing was found")


def _add_how(how: Any) -> None:
    how.add_argument("--batch_size", type=int, default=4, metavar="N", help="pictures for the models at once (4)")
    how.add_argument("--device", default="auto", help="cuda, cuda:1, mps, cpu; auto takes the first there is")
    how.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the models; auto is bfloat16 on a GPU that has it, else float32",
    )
    how.add_argument(
        "--overwrite",
        nargs="?",
        choices=("generated", "drawn"),
        const="generated",
        default="none",
        help="make masks again that generate made; with drawn also those that a person made or changed: copies of them are kept",
    )
    how.add_argument("--compare", action="store_true", help="tell of masks that are not of what stands out (U2-Net)")
    how.add_argument(
        "--strict",
        action="store_true",
        help="exit status 1 when nothing was found in some of them, or a mask looks odd",
    )
    how.add_argument("--sheet", metavar="NAME", help="contact sheet NAME.png and NAME.html (default: OUTPUT_DIR_sheet)")
    how.add_argument("--sheet_limit", type=int, default=48, metavar="N", help="items on it (48); 0 draws none")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from masked_loss_triton.commands.farm import ray_options, shard_of
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.atomic import remove_leftovers_below
    from masked_loss_triton.files.folders import check_folder_is_writable
    from masked_loss_triton.files.shard import shard_lock
    from masked_loss_triton.generate.sheet import choose_sheet_name
    from masked_loss_triton.generate.summary import Summary

    if args.sheet_limit < 0:
        raise UserError(f"--sheet_limit must be 0 or more, got {args.sheet_limit}", 2)
    generation, shard, ray = _generation(args), shard_of(args), ray_options(args)
    if args.workers is not None and ray is None:
        raise UserError("--workers belongs to --engine ray: the backend knows its number of threads", 2)
    output = generation.masks
    found = _find(args, shard)
    sheet = choose_sheet_name(args.sheet, Path(args.images), output)
    if shard.count > 1:  # each shard has its own
        sheet = sheet.with_name(f"{sheet.name}_{shard.name}")
    check_folder_is_writable(output, "--masks")
    summary = Summary()
    with shard_lock(output, "masked-loss generate", shard, ray["run"] if ray is not None else ""):
        remove_leftovers_below(output)
        found = _find(args, shard)  # again: another run may have had the lock until now
        for problem in found.problems:
            summary.add_problem(problem)
        pending = [job for job in found.jobs if args.overwrite != "none" or not job.masks]
        if args.overwrite == "none":
            summary.add_present([job for job in found.jobs if job.masks], generation)
        if pending:
            _make(pending, generation, summary, None if ray is None else {"shard": shard, **ray})
        if ray is not None:
            remove_leftovers_below(output)  # of workers that died
    summary.add_copies(generation.copies)
    summary.add_unread(found.unread)
    if args.sheet_limit and found.jobs:
        _draw(sheet, found.jobs, args, summary)
    summary.show()
    return 1 if summary.problems or (args.strict and (summary.nothing or summary.doubtful)) else 0


def _find(args: argparse.Namespace, shard: Shard) -> Jobs:
    from pathlib import Path

    from masked_loss_triton.errors import UserError
    from masked_loss_triton.generate.jobs import find_jobs
    from masked_loss_triton.masks.reading import unread_text

    clip_suffix = ".mkv" if args.clip_output == "video" else ""
    folders = Path(args.images), Path(args.masks)
    found = find_jobs(*folders, clip_suffix, shard, args.label or "")
    whole = found if found.jobs or found.problems else find_jobs(*folders, clip_suffix, label=args.label or "")
    if not whole.jobs and not whole.problems:
        skipped = f" ({unread_text(found.unread)})" if found.unread else ""
        raise UserError(f"--images {args.images} has no pictures or clips in it{skipped}", 2)
    return found


def _make(jobs: list[Job], generation: Generation, summary: Summary, ray: dict[str, Any] | None) -> None:
    from masked_loss_triton.files.progress import Progress

    if ray is None:
        from masked_loss_triton.generate.batches import generate_masks

        finished = generate_masks(jobs, generation)
    else:
        from masked_loss_triton.generate.on_ray import generate_masks_on_ray

        finished = generate_masks_on_ray(jobs, generation, **ray)
    with Progress("generate", len(jobs)) as progress:
        for done in finished:
            summary.add(done, progress.say)
            progress.advance()
    summary.rate = progress.rate


def _draw(name: Path, jobs: list[Job], args: argparse.Namespace, summary: Summary) -> None:
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.generate.sheet import write_sheet

    try:
        shown = write_sheet(name, jobs, args.sheet_limit, f"Masks of {args.images}")
    except UserError as error:
        summary.add_problem(str(error))
        return
    if shown:
        summary.ends.append(f"{name}.png and {name}.html show {shown} of {len(jobs)}")


def _generation(args: argparse.Namespace) -> Generation:
    from pathlib import Path

    from masked_loss_triton.files.progress import printable
    from masked_loss_triton.generate.backends import DEFAULT, flags_of
    from masked_loss_triton.generate.batches import Generation
    from masked_loss_triton.generate.choice import choose_backend

    backend, models = args.backend, dict(sorted(vars(args).items()))
    models["static_dir"] = args.static_dir or args.images
    if backend == DEFAULT:
        backend, why = choose_backend(bool(args.text_prompt or args.exclude_prompt), models)
        if why:
            print(printable(f"masked-loss generate: {why}"), file=sys.stderr, flush=True)
    return Generation(
        request=_request(args, backend),
        masks=Path(args.masks),
        backend=backend,
        models=flags_of(backend, models),  # those of other backends do not count
        **{field: getattr(args, field) for field in GENERATION},
    )


def _request(args: argparse.Namespace, backend: str) -> MaskRequest:
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.generate.backends import WORDLESS, split_backend
    from masked_loss_triton.generate.prompts import MaskRequest, parse_interval, parse_prompts

    texts, detector = args.text_prompt, split_backend(backend)[0]
    if detector in WORDLESS:
        if texts or args.exclude_prompt:
            flag = "--text_prompt" if texts else "--exclude_prompt"
            raise UserError(
                f"--backend {backend} reads no words, it masks {WORDLESS[detector]}: leave out {flag}, or take a backend that "
                "reads them (florence2+sam2, florence2+u2net, sam3)",
                2,
            )
        texts = [WORDLESS[detector]]
    elif not texts:
        raise UserError('say what to look for: --text_prompt "person"', 2)
    prompts, exclude = parse_prompts(texts, args.exclude_prompt)
    return MaskRequest(
        prompts=prompts,
        exclude=exclude,
        intervals=tuple(map(parse_interval, args.intervals)),
        reference_box=tuple(args.reference_box),
        **{field: getattr(args, field) for field in REQUEST},
    )
