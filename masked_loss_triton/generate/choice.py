"""Chooses a backend by what is asked for and by what is on this machine."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate import florence2, saliency, sam2, sam3


def choose_backend(has_words: bool, models: Mapping[str, Any]) -> tuple[str, str]:
    """Returns what "auto" is, and one line that says why, and what would be better where it is not the best.

    Words need Florence-2; what it finds is cut out by SAM 2, or by U2-Net where SAM 2 is absent. SAM 3 is taken where its model is
    named, or where it is on this machine and Florence-2 is not. Without words what stands out is found and cut out by U2-Net,
    or, where its weights are absent, GrabCut cuts out a central box.

    Args:
        has_words: whether there are prompts.
        models: the flags of the models, by name.
    """
    has_saliency = True
    try:
        saliency.find_weights(models.get("saliency_model") or "")
    except UserError:
        if models.get("saliency_model"):
            raise
        has_saliency = False
    if has_words:
        sam = models.get("sam2_model") or sam2.MODEL
        has_florence = is_here(models.get("florence2_model") or florence2.MODEL)
        names_sam3 = models.get("sam3_model") not in (None, sam3.MODEL)
        if names_sam3 or (not has_florence and is_here(sam3.MODEL)):
            return "sam3", ""
        if is_here(sam) or not has_florence:
            return "florence2+sam2", ""  # or the error that tells what is missing
        if has_saliency:
            return (
                "florence2+u2net",
                f"the weights of {sam} are not on this machine: U2-Net cuts out what Florence-2 finds",
            )
        return (
            "florence2+grabcut",
            f"the weights of {sam} are not on this machine: GrabCut cuts out what Florence-2 finds. Better masks: "
            f"`hf download {sam}`, or {saliency.INSTALL} (4.6 MB)",
        )
    if has_saliency:
        return "u2net", "no --text_prompt: the masks are of what stands out (U2-Net)"
    return (
        "grabcut",
        "no --text_prompt, and u2netp.onnx is not on this machine: GrabCut cuts out a central box. Better masks: "
        f"{saliency.INSTALL} (4.6 MB)",
    )


def is_here(model: str) -> bool:
    """Whether a model of the Hugging Face hub is on this machine, or is a folder that is there."""
    if os.path.isdir(model):
        return True
    if importlib.util.find_spec("huggingface_hub") is None:
        return False
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:
        return False
