"""`masked-loss train`: an unmodified musubi-tuner or blissful-tuner, with masked loss in it."""

from __future__ import annotations

import argparse
import traceback

HELP = "Train with masks in an unmodified musubi-tuner or blissful-tuner."
EXAMPLE = (
    "masked-loss train wan --use_mask_loss --mask_min_weight 0.05 --dataset_config dataset.toml --dit wan.safetensors ...\n"
    "  several GPUs: accelerate launch -m masked_loss_triton.integration.musubi wan --use_mask_loss ...\n"
    "  all flags, ours and the trainer's: masked-loss train wan --help"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--musubi", metavar="FOLDER", help="the trainer's checkout (default: the installed package)")
    from masked_loss_triton.cache.families import FAMILIES

    parser.add_argument("family", nargs="?", metavar="FAMILY", help=f"the model family, one of: {', '.join(FAMILIES)}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="our flags and the trainer's own, in any order")


def run(args: argparse.Namespace) -> int:
    from masked_loss_triton.cache.families import FAMILIES, named
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.integration.musubi.launch import launch

    if args.family is None:
        raise UserError(f"name the model family, one of {', '.join(FAMILIES)}: {EXAMPLE.splitlines()[0]}", 2)
    name = named(args.family)
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--musubi", default=args.musubi)
    ours.add_argument("--debug", action="store_true", default=args.debug)
    known, arguments = ours.parse_known_args(args.arguments)
    args.debug = known.debug
    try:
        script = args.family.rsplit("/", 1)[-1].removesuffix(".py")
        launch(name, arguments, known.musubi, whole_model=script in FAMILIES[name].whole_model)
    except UserError:
        raise
    except Exception:
        # A fault inside the trainer is looked for with its traceback; one line would not do.
        traceback.print_exc()
        return 1
    return 0
