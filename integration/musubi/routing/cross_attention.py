"""A second, cheaper attention mask, for WAN: what the text says is heard inside the mask alone.

Each block adds to a token what its cross-attention hears in the text. Here that is multiplied by the token's weight, so that a
trigger word speaks to the subject and not to the background. Where all weights are 1 nothing changes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from masked_loss_triton import MaskedLossConfig, mask_weights
from masked_loss_triton.errors import UserError
from masked_loss_triton.routing import Kept, Layout, RoutedWeights


class CrossAttentionGate:
    """Hooks on the cross-attention of every block, for a whole run: with gradient checkpointing a block runs again in the backward.

    Args:
        layout: of the transformer.

    Raises:
        UserError: for a model whose blocks are compiled.
    """

    def __init__(self, layout: Layout) -> None:
        self.patch = layout.patch
        self._gate: torch.Tensor | None = None
        self._kept: Kept | None = None
        for block in (block for lane in layout.lanes for block in lane.blocks):
            if hasattr(block, "_orig_mod"):
                raise UserError("--mask_cross_attention cannot be had with --compile: drop one", 2)
            attention = block.cross_attn if hasattr(block, "cross_attn") else block.attn2
            attention.register_forward_hook(self._hook)

    def plan(
        self,
        mask: torch.Tensor | None,
        config: MaskedLossConfig,
        positions: tuple[int, int, int],
        routed: RoutedWeights | None,
    ) -> None:
        """Before a micro-batch: its mask, or None where nothing is gated, and the tokens that routed blocks compute."""
        self._gate, self._kept = None, None if routed is None else routed.kept
        if mask is not None:
            weights, _ = mask_weights(mask, config, shape=(mask.shape[0], *positions), has_prior=False)
            # A token is gated by the largest weight of its positions.
            self._gate = F.max_pool3d(weights.unsqueeze(1), self.patch).flatten(1).unsqueeze(-1)

    def _hook(self, attention: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        # Only what is differentiated is gated: neither the teacher nor samples.
        if self._gate is None or not torch.is_grad_enabled():
            return None
        gate = self._gate.to(output)
        if output.shape[1] != gate.shape[1]:
            assert self._kept is not None
            gate = gate.gather(1, self._kept.index.to(gate.device).expand(len(gate), -1).unsqueeze(-1))
        return output * gate
