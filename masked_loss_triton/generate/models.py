"""Loads models through transformers' own classes, with one clear line for everything that can be missing."""

from __future__ import annotations

import os
from typing import Any

from masked_loss_triton.errors import UserError, install_command

MINIMUM = (4, 56)  # the first transformers with Florence-2 and SAM 2 of its own; no code is ever loaded from a hub
MISSING_SHARE = 0.1  # of a model's weights: above it the folder holds another model, or this one in another format


def load_pretrained(
    name: str,
    model_class: str,
    processor_class: str,
    model_types: tuple[str, ...],
    flag: str,
    device_name: str,
    dtype_name: str,
) -> tuple[Any, Any]:
    """Loads a model in evaluation mode, and its processor.

    Nothing is downloaded: gigabytes are for the user to fetch, once, knowingly.

    Args:
        name: repository on the Hugging Face hub that was downloaded before, or folder.
        model_class, processor_class: their names in transformers.
        model_types: those of config.json that are accepted.
        flag: the flag that `name` came from, for the error.
        device_name, dtype_name: see `choose_device` and `choose_dtype`.

    Raises:
        UserError: when transformers is absent or too old, when the weights are absent, saying how to get them, and when they
            are those of another model.
    """
    transformers = _transformers()
    if not hasattr(transformers, model_class):
        raise UserError(
            f"{flag}: transformers {transformers.__version__} has no {model_class}: pip install -U transformers", 2
        )
    device = choose_device(device_name)
    try:
        config, _ = transformers.PretrainedConfig.get_config_dict(name, local_files_only=True)
        if config.get("model_type") not in model_types:
            raise UserError(
                f"{flag} {name} is a model of type {config.get('model_type')!r}, not {' or '.join(model_types)}", 2
            )
        processor = getattr(transformers, processor_class).from_pretrained(name, local_files_only=True)
        model, info = getattr(transformers, model_class).from_pretrained(
            name, dtype=choose_dtype(dtype_name, device), local_files_only=True, output_loading_info=True
        )
    except OSError as error:
        raise _absent(name, flag, error) from error
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{flag} {name} cannot be loaded ({reason}): download it again", 2) from error
    missing = len(info["missing_keys"])
    if missing > MISSING_SHARE * len(model.state_dict()):
        raise UserError(
            f"{flag} {name} lacks {missing} of {len(model.state_dict())} weights: give the weights in transformers' own format "
            "(for Florence-2 those of florence-community, not of microsoft)",
            2,
        )
    try:
        return model.to(device).eval(), processor
    except RuntimeError as error:
        raise UserError(f"--device {device_name}: {' '.join(str(error).split())[:200]}", 2) from error


def choose_device(name: str) -> Any:
    """Returns the torch device of this name; auto is CUDA or ROCm, else Apple's, else the CPU."""
    import torch

    if name == "auto":
        mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is no device: write cuda, cuda:1, mps or cpu", 2) from error


def choose_dtype(name: str, device: Any) -> Any:
    """Returns the torch dtype of this name; auto is bfloat16 on a GPU that computes in it, else float32."""
    import torch

    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    return getattr(torch, name)


def _transformers() -> Any:
    wanted = install_command("generate")
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise UserError(f"Florence-2, SAM 2 and SAM 3 need transformers: {wanted}", 2) from error
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < MINIMUM:
        needed = ".".join(map(str, MINIMUM))
        raise UserError(
            f"Florence-2, SAM 2 and SAM 3 need transformers {needed}, this is {transformers.__version__}: {wanted}", 2
        )
    # Its warnings speak to programmers: that a video checkpoint is loaded for pictures, for one.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _absent(name: str, flag: str, error: OSError) -> UserError:
    if os.path.isdir(name):
        return UserError(f"{flag} {name} has no complete model in it ({' '.join(str(error).split())[:200]})", 2)
    return UserError(
        f"the weights of {name} are not on this machine: run `hf download {name}`, or give a folder with {flag} FOLDER",
        2,
    )
