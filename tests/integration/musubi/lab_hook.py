"""Hooks for the laboratory's run_train.py: in place of the trainer's main they start ours, on the same command line."""

from __future__ import annotations

import importlib
import sys

MODULES = {"wan": "wan_train_network", "hv": "hv_train_network", "qwen": "qwen_image_train_network"}


def launcher() -> None:
    """The harness imports a trainer and calls its main; that call becomes `masked-loss train`."""
    family = sys.argv[1]
    module = importlib.import_module(f"musubi_tuner.{MODULES[family]}")
    theirs = module.main

    def ours() -> None:
        from masked_loss_triton.cli import main

        module.main = theirs
        status = main(["train", family, *sys.argv[1:]])
        if status:
            sys.exit(status)

    module.main = ours
