"""The trainer's own caching script, run in this process, with masks added to each cache as it is written.

For users who have not cached yet: one command instead of two, and mask keys may stand in the dataset file, which the script
then gets without them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from masked_loss_triton.cache.dataset import without_mask_keys
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.inject import Outcome, Prepared, inject
from masked_loss_triton.cache.items import parse_cache
from masked_loss_triton.errors import UserError

# Where every family's saving ends: musubi-tuner, and the older layout that blissful-tuner has.
SAVE_MODULES = ("musubi_tuner.dataset.cache_io", "musubi_tuner.dataset.image_video_dataset")
SAVE_FUNCTION = "save_latent_cache_common"


def run_caching_script(args: argparse.Namespace, prepared: list[Prepared], done: Callable[[Outcome], None]) -> None:
    """Runs the trainer's script on the dataset file and masks each cache right after the script has written it.

    Args:
        args: `arch`, `dataset_config`, `dtype` and `encode`, the script's own arguments.
        prepared: the datasets; their caches need not exist yet.
        done: called with what happened to each cache.

    Raises:
        UserError: when the trainer cannot be imported, or its script fails or ends with an error status.
    """
    name = FAMILIES[args.arch].caching_script
    script = import_trainer(f"musubi_tuner.{name}")
    by_folder = {os.path.realpath(entry.dataset.cache_directory): entry for entry in prepared}

    def mask(path: Path) -> None:
        found = by_folder.get(os.path.realpath(path.parent))
        item = parse_cache(path, found.dataset, found.family, found.sources) if found is not None else None
        if found is not None and item is not None:
            for outcome in inject(found, [item], dtype=args.dtype):
                done(outcome)

    argv, undo = sys.argv, _wrap_saving(mask)
    try:
        with tempfile.TemporaryDirectory(prefix="masked_loss_") as folder:
            config = Path(folder) / "dataset.json"
            config.write_text(json.dumps(without_mask_keys(args.dataset_config)), encoding="utf-8")
            sys.argv = [f"{name}.py", "--dataset_config", str(config), *args.encode]
            script.main()
    except SystemExit as error:
        if error.code not in (None, 0):
            raise UserError(f"the trainer's {name}.py ended with status {error.code}") from error
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the trainer's {name}.py failed ({reason}): --debug shows where") from error
    finally:
        sys.argv = argv
        undo()


def _wrap_saving(mask: Callable[[Path], None]) -> Callable[[], None]:
    """Calls `mask` with every cache after the trainer has saved it. Returns what takes the wrapper off again."""
    for name in SAVE_MODULES:
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        save = getattr(module, SAVE_FUNCTION, None)
        if save is None:
            continue

        def save_and_mask(item_info: Any, *rest: Any, _save: Any = save, **options: Any) -> None:
            _save(item_info, *rest, **options)
            mask(Path(item_info.latent_cache_path))

        setattr(module, SAVE_FUNCTION, save_and_mask)
        return lambda: setattr(module, SAVE_FUNCTION, save)
    raise UserError(
        "this version of the trainer saves its caches in another way: run its script, then masked-loss cache"
    )


def import_trainer(name: str, where: str = "put its src folder in PYTHONPATH") -> Any:
    """A module of the trainer's package.

    Raises:
        UserError: when the trainer, or a package that it needs, is not installed; `where` is what else the user can do.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise UserError(
                f"musubi_tuner is not installed here: run this in the trainer's environment, or {where}", 2
            ) from error
        raise UserError(f"the trainer needs the package {error.name!r}: install its requirements", 2) from error
