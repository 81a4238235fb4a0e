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


def launch(family: str, arguments: Sequence[str], checkout: str | None = None) -> None:
    """Runs the trainer's own main in this process.

    Args:
        family: a name of `FAMILIES`.
        arguments: the trainer's command line, with our flags among its own.
        checkout: a folder of its source code, or None for the installed package.

    Raises:
        UserError: when the trainer cannot be found or is of an unknown version, and for faulty flags and caches.
    """
    module, trainer = find_trainer(family, checkout)
    parser = module.setup_parser_common
    module.setup_parser_common = lambda: options.add_arguments(parser())
    setattr(module, trainer.__name__, masked_class(trainer))
    sys.argv = [f"{FAMILIES[family].training_script}.py", *arguments]
    module.main()


def find_trainer(family: str, checkout: str | None) -> tuple[Any, type]:
    """The trainer's module and class.

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
    file, names = FAMILIES[family].training_script, FAMILIES[family].trainers
    module = import_trainer(f"musubi_tuner.{file}", "name its checkout with --musubi FOLDER")
    for name in names:
        # Defined here and not imported from another family's module.
        if isinstance(found := getattr(module, name, None), type) and found.__module__ == module.__name__:
            return module, found
    raise UserError(f"musubi_tuner.{file} has no {' or '.join(names)}: this version of the trainer is not supported")
