"""Exact, fused, memory-lean masked loss for fine-tuning video and image diffusion models.

>>> from masked_loss_triton import MaskedLossConfig
>>> MaskedLossConfig(gamma=0.7, min_weight=0.05).normalization
'weighted_mean'
"""

from masked_loss_triton.config import MaskedLossConfig
from masked_loss_triton.inputs import FlowTarget
from masked_loss_triton.loss import MaskedLoss, mask_weights, masked_loss
from masked_loss_triton.stats import MaskedLossStats

__all__ = ["FlowTarget", "MaskedLoss", "MaskedLossConfig", "MaskedLossStats", "mask_weights", "masked_loss"]
__version__ = "0.1.0"
