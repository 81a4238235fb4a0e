"""How tokens run through the trainer's own transformers : WAN, HunyuanVideo and Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch

from masked_loss_triton.errors import UserError
from masked_loss_triton.routing.lanes import Cut, Lane, Layout


def layout_of(model: Any) -> Layout:
    """How tokens run through the trainer's model.

    Raises:
        UserError: for a model that cannot be routed.
    """
    for one in type(model).__mro__:
        if one.__name__ in LAYOUTS:
            return LAYOUTS[one.__name__](model)
    raise UserError(
        f"--mask_routing knows WAN, HunyuanVideo and Qwen-Image, and not {type(model).__name__}: drop the flag", 2
    )


def wan(model: Any) -> Layout:
    """WAN 2.1 and 2.2, text or picture to video: a rotary embedding for each sample."""
    names = ("x", "e", "seq_lens", "grid_sizes", "freqs", "context", "context_lens")
    return Layout((Lane(model.blocks, names, "x", None, _shorten_wan),), tuple(model.patch_size), False, model.dim)


def _shorten_wan(named: dict[str, Any], cut: Cut) -> None:
    if not isinstance(named["freqs"], list):
        raise UserError(
            "--mask_routing takes WAN's own rotary embedding: train with --rope_func default, or drop it", 2
        )
    count, batch = cut.index.shape[1], len(named["freqs"])
    rows = cut.index.expand(batch, -1)
    named["freqs"] = cut.once(
        "freqs", named["freqs"], lambda freqs: [one.to(row.device)[row] for one, row in zip(freqs, rows, strict=True)]
    )
    # The attention of a block reads lengths alone from the grid.
    named["grid_sizes"] = torch.tensor([[count, 1, 1]] * batch)
    named["seq_lens"] = torch.full((batch,), count)
    if named["e"].dim() == 4 and named["e"].shape[1] > 1:  # 2.2: a time for each token
        named["e"] = cut.once("e", named["e"], cut.take)


def hunyuan_video(model: Any) -> Layout:
    """Double blocks, then single blocks whose tokens are those of the latents, then text."""
    rest = ("attn_mask", "total_len", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv", "freqs_cis")
    double = Lane(model.double_blocks, ("img", "txt", "vec", *rest), "img", 0, _shorten_hunyuan_video)
    single = Lane(model.single_blocks, ("x", "vec", "txt_len", *rest), "x", None, _shorten_hunyuan_video)
    return Layout((double, single), tuple(model.patch_size), True, model.hidden_size)


def _shorten_hunyuan_video(named: dict[str, Any], cut: Cut) -> None:
    dropped = cut.dropped
    if named["freqs_cis"] is not None:
        tokens = cut.kept.index[0]
        named["freqs_cis"] = cut.once(
            "freqs", named["freqs_cis"], lambda freqs: tuple(one.to(tokens.device)[tokens] for one in freqs)
        )
    if named["attn_mask"] is not None:  # (B, 1, tokens, tokens); only text, at the end, is ever masked
        named["attn_mask"] = cut.once(
            "mask", named["attn_mask"], lambda mask: mask[..., dropped:, dropped:].contiguous()
        )
    if named["total_len"] is not None:
        named["total_len"] = named["total_len"] - dropped
    for name in ("cu_seqlens_q", "cu_seqlens_kv"):  # 0, then where each sample's words and where its padding end
        named[name] = cut.once(name, named[name], lambda ends: _earlier(ends, dropped))
    named["max_seqlen_q"], named["max_seqlen_kv"] = named["max_seqlen_q"] - dropped, named["max_seqlen_kv"] - dropped


def _earlier(ends: torch.Tensor, dropped: int) -> torch.Tensor:
    samples = (torch.arange(len(ends), device=ends.device) + 1) // 2
    return ends - (samples * dropped).to(ends.dtype)


def qwen_image(model: Any) -> Layout:
    """Text to picture, edit and layered: tokens of control pictures follow those of the latents, and are always kept."""
    names = (
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "temb",
        "image_rotary_emb",
        "txt_seq_lens",
        "joint_attention_kwargs",
        "timestep_zero_index",
    )
    lane = Lane(model.transformer_blocks, names, "hidden_states", 1, _shorten_qwen_image)
    return Layout((lane,), (1, 2, 2), True, model.inner_dim)


def _shorten_qwen_image(named: dict[str, Any], cut: Cut) -> None:
    named["image_rotary_emb"] = cut.once(
        "rope", named["image_rotary_emb"], lambda rope: (cut.take(rope[0], 0), *rope[1:])
    )
    zero = named.get("timestep_zero_index")  # Edit 2511: where the control pictures begin
    if zero is not None:
        if zero != cut.kept.tokens:
            raise UserError(
                "--mask_routing cannot tell a layered picture's control tokens apart in this model: drop it", 2
            )
        named["timestep_zero_index"] = zero - cut.dropped


LAYOUTS = {"WanModel": wan, "HYVideoDiffusionTransformer": hunyuan_video, "QwenImageTransformer2DModel": qwen_image}
