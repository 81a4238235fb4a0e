"""`masked-loss demo`: the whole path from photographs to a LoRA that learned the subject."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from masked_loss_triton.errors import UserError

HELP = "Train a tiny WAN transformer on real photographs, with and without masks, and write a report."
EXAMPLE = "masked-loss demo --output demo_report"

DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "torch", "triton", "reference")
STEPS, QUICK_STEPS = 600, 12
MAX_STEPS = 100_000
MAX_SEED = 2**63 - 1  # what torch takes, less the negative ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # Every value is checked in `run`, for one kind of error message whatever is wrong.
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="your photographs instead of the shipped ones; masks from their alpha channel, "
        "from NAME_mask.* beside NAME.*, else of what stands out, as `generate` makes them",
    )
    parser.add_argument("--output", metavar="DIR", default="demo_report", help="folder to write (default: demo_report)")
    parser.add_argument("--steps", metavar="N", help=f"training steps of each LoRA (default: {STEPS})")
    parser.add_argument("--seed", metavar="N", default="0", help="the same seed, the same numbers (default: 0)")
    parser.add_argument("--device", metavar="|".join(DEVICES), default="auto", help="where to train (default: auto)")
    parser.add_argument(
        "--backend", metavar="|".join(BACKENDS), default="auto", help="implementation of the loss (default: auto)"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs; shows nothing")


def run(args: argparse.Namespace) -> int:
    """Checks the flags, runs the demo, prints the table. 0 when every claim was shown, 1 when one was not."""
    seed = _whole_number("--seed", args.seed, 0, MAX_SEED)
    steps = _whole_number("--steps", args.steps, 1, MAX_STEPS) if args.steps is not None else None
    _one_of("--device", args.device, DEVICES)
    _one_of("--backend", args.backend, BACKENDS)
    images = None if args.images is None else Path(args.images)
    if images is not None and not images.is_dir():
        raise UserError(f"--images {images}: {'not a folder' if images.exists() else 'there is no such folder'}", 2)

    # Heavy from here on: torch, diffusers, peft, matplotlib take several seconds.
    if sys.stderr.isatty():
        print("loading torch and diffusers", end="", file=sys.stderr, flush=True)
    from masked_loss_triton.demo.output import check_output
    from masked_loss_triton.demo.pipeline import Settings, run_demo

    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    settings = Settings(
        output=check_output(Path(args.output)),
        images=images,
        steps=steps if steps is not None else QUICK_STEPS if args.quick else STEPS,
        seed=seed,
        device=args.device,
        backend=args.backend,
        quick=args.quick,
    )
    return run_demo(settings)


def _whole_number(flag: str, text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not least <= value <= most:
        raise UserError(f"{flag} must be a whole number from {least} to {most}, got {text!r}", 2)
    return value


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{flag} must be one of {', '.join(choices)}, got {value!r}", 2)
