"""`masked-loss train`: an unmodified musubi-tuner or blissful-tuner, with masked loss in it."""

from __future__ import annotations

import argparse
import traceback

HELP = "Train HunyuanVideo, WAN or Qwen-Image in an unmodified musubi-tuner or blissful-tuner, with masks."
EXAMPLE = (
    "masked-loss train wan --use_mask_loss --mask_min_weight 0.05 --dataset_config dataset.toml --dit wan.safetensors ...\n"
    "  several GPUs: accelerate launch -m masked_loss_triton.integration.musubi wan --use_mask_loss ...\n"
    "  all flags, ours and the trainer's: masked-loss train wan --help"
)
FULL_TRAINING = ("hv_train", "qwen_image_train", "zimage_train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--musubi", metavar="FOLDER", help="the trainer's checkout (default: the installed package)")
    parser.add_argument("family", metavar="{hv,wan,qwen}", help="the model family")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="our flags and the trainer's own, in any order")


def run(args: argparse.Namespace) -> int:
    from masked_loss_triton.cache.families import FAMILIES, trained
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.integration.musubi.launch import launch

    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--musubi", default=args.musubi)
    ours.add_argument("--debug", action="store_true", default=args.debug)
    known, arguments = ours.parse_known_args(args.arguments)
    args.debug = known.debug
    name = args.family.removesuffix(".py")
    if name in FULL_TRAINING:
        raise UserError(
            f"{name} trains the whole model in a loop of its own, where no loss can be put in: train a LoRA with hv, wan or qwen",
            2,
        )
    if name not in trained():
        why = "can be masked in its caches and not trained yet" if name in FAMILIES else "is no model family"
        raise UserError(f"{args.family!r} {why}: give one of {', '.join(trained())}", 2)
    try:
        launch(name, arguments, known.musubi)
    except UserError:
        raise
    except Exception:
        # A fault inside the trainer is looked for with its traceback; one line would not do.
        traceback.print_exc()
        return 1
    return 0
