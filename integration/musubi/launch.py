"""Starts an installed or checked-out trainer with masked loss in it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from masked_loss_triton.cache.encode import import_trainer
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi import options
from masked_loss_triton.integration.musubi.trainer import masked_class


def launch(family: str, arguments: Sequence[str], checkout: str | None = None, whole_model: bool = False) -> None:
    """Runs the trainer's own main in this process.

    Args:
        family: a name of `FAMILIES`.
        arguments: the trainer's command line, with our flags among its own.
        checkout: a folder of its source code, or None for the installed package.
        whole_model: train the model itself and no LoRA, where the family has a script for it.

    Raises:
        UserError: when the trainer cannot be found or is of an unknown version, and for faulty flags and caches.
    """
    entry = FAMILIES[family]
    script, names = (
        (entry.training_script, entry.trainers) if not whole_model else (entry.whole_model[0], entry.whole_model[1:])
    )
    module, trainer = find_trainer(script, names, checkout)
    parser = module.setup_parser_common
    module.setup_parser_common = lambda: options.add_arguments(parser())
    setattr(module, trainer.__name__, masked_class(trainer, whole_model))
    sys.argv = [f"{script}.py", *arguments]
    module.main()


def find_trainer(script: str, names: Sequence[str], checkout: str | None) -> tuple[Any, type]:
    """The trainer's module, by the name of its script, and the first class of these names that it has.

    Raises:
        UserError: naming what is missing.
    """
    if checkout is not None:
        source = next(
            (path for path in (Path(checkout) / "src", Path(checkout)) if (path / "musubi_tuner").is_dir()), None
        )
        if source is None:
            raise UserError(f"--musubi {checkout}: no musubi_tuner in it: name the folder of the trainer's checkout", 2)
        sys.path.insert(0, str(source))
    module = import_trainer(f"musubi_tuner.{script}", "name its checkout with --musubi FOLDER")
    for name in names:
        # Defined here and not imported from another family's module.
        if isinstance(found := getattr(module, name, None), type) and found.__module__ == module.__name__:
            return module, found
    raise UserError(f"musubi_tuner.{script} has no {' or '.join(names)}: this version of the trainer is not supported")
