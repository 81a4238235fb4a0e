"""How tokens run through the transformers of diffusers: WAN, HunyuanVideo, Qwen-Image."""

from __future__ import annotations

from typing import Any

from masked_loss_triton.routing.lanes import Cut, Lane, Layout


def layout_of(model: Any) -> Layout:
    """How tokens run through a model, the transformer itself and not what accelerate or torch.compile wraps around it.

    Raises:
        ValueError: for a model that cannot be routed, with the reason.
    """
    for one in type(model).__mro__:
        if one.__name__ in LAYOUTS and one.__module__.startswith("diffusers."):
            return LAYOUTS[one.__name__](model)
    raise ValueError(f"{type(model).__name__} cannot be routed: give one of diffusers' {', '.join(LAYOUTS)}, unwrapped")


def wan(model: Any) -> Layout:
    names = ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb")
    lane = Lane(model.blocks, names, "hidden_states", None, _shorten_wan)
    return Layout((lane,), tuple(model.config.patch_size), False, _width(model))


def _shorten_wan(named: dict[str, Any], cut: Cut) -> None:
    named["rotary_emb"] = cut.once("rope", named["rotary_emb"], lambda rope: tuple(map(cut.take, rope)))
    if named["temb"].dim() == 4:  # WAN 2.2 5B: a time for each token
        named["temb"] = cut.once("temb", named["temb"], cut.take)


def hunyuan_video(model: Any) -> Layout:
    if model.config.get("image_condition_type") == "token_replace":
        raise ValueError(
            "a HunyuanVideo model with image_condition_type token_replace counts the tokens of its first frame, and cannot be "
            "routed"
        )
    patch = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
    streams = ("hidden_states", "encoder_hidden_states", "temb", "attention_mask")
    double = Lane(model.transformer_blocks, (*streams, "freqs_cis"), "hidden_states", 0, _shorten_hunyuan_video)
    single = double._replace(blocks=model.single_transformer_blocks, names=(*streams, "image_rotary_emb"))
    return Layout((double, single), patch, True, _width(model))


def _shorten_hunyuan_video(named: dict[str, Any], cut: Cut) -> None:
    for name in {"freqs_cis", "image_rotary_emb"} & named.keys():
        named[name] = cut.once("rope", named[name], lambda rope: tuple(cut.take(x, 0) for x in rope))
    # The mask leaves out text alone, which comes last.
    named["attention_mask"] = cut.once(
        "mask", named["attention_mask"], lambda mask: mask[..., cut.dropped :].contiguous()
    )


def qwen_image(model: Any) -> Layout:
    names = (
        "hidden_states",
        "encoder_hidden_states",
        "encoder_hidden_states_mask",
        "temb",
        "image_rotary_emb",
        "joint_attention_kwargs",
        "modulate_index",
    )
    patch = model.config.patch_size
    lane = Lane(model.transformer_blocks, names, "hidden_states", 1, _shorten_qwen_image)
    return Layout((lane,), (1, patch, patch), True, _width(model))


def _shorten_qwen_image(named: dict[str, Any], cut: Cut) -> None:
    named["image_rotary_emb"] = cut.once(
        "rope", named["image_rotary_emb"], lambda rope: (cut.take(rope[0], 0), *rope[1:])
    )
    if named.get("modulate_index") is not None:  # Edit 2511: which tokens belong to control pictures
        named["modulate_index"] = cut.once("index", named["modulate_index"], cut.take)


def _width(model: Any) -> int:
    return int(model.config.num_attention_heads * model.config.attention_head_dim)


LAYOUTS = {
    "WanTransformer3DModel": wan,
    "HunyuanVideoTransformer3DModel": hunyuan_video,
    "QwenImageTransformer2DModel": qwen_image,
}
