"""Exact, fused, memory-lean masked loss for fine-tuning video and image diffusion models.

>>> from masked_loss_triton import MaskedLossConfig
>>> MaskedLossConfig(gamma=0.7, min_weight=0.05).normalization
'weighted_mean'
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from masked_loss_triton.call import FlowTarget
    from masked_loss_triton.config import MaskedLossConfig
    from masked_loss_triton.loss import MaskedLoss, mask_weights, masked_loss
    from masked_loss_triton.stats import MaskedLossStats

__all__ = ["FlowTarget", "MaskedLoss", "MaskedLossConfig", "MaskedLossStats", "mask_weights", "masked_loss"]
__version__ = "0.2.0"

# In a checkout without symbolic links (Windows, a forge's zip, the sdist) kernels/ and integration/ lie beside this folder.
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(__path__[0]))

_HOMES = {
    "FlowTarget": "call",
    "MaskedLoss": "loss",
    "MaskedLossConfig": "config",
    "MaskedLossStats": "stats",
    "mask_weights": "loss",
    "masked_loss": "loss",
}


def __getattr__(name: str) -> Any:
    """A public name is imported when it is first used: `masked-loss --help` does not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, each once."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
