"""What the example must know about each model family: how diffusers names it, and how it is called.

Each `predict` takes noisy latents (B, 16, F, h, w), noise levels sigma (B,) in (0, 1) and the text as `latent_caches` reads it,
and returns the predicted noise - latents in the shape of the latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from masked_loss_triton.errors import UserError

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_ATTENTION = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        name: as --arch of `masked-loss cache` has it.
        transformer, pipeline: names of the diffusers classes; the pipeline's class saves the LoRA.
        suffix: how the trainer's cache files end.
        text_key, text_script: what a text cache must hold, without its dtype, and the trainer's script that writes it.
        shift: default of the flow shift, which moves training towards high noise.
        lora_targets: linear layers that get a LoRA.
        latent_scale: factor from cached latents to the model's. The HunyuanVideo caches hold what the VAE gave; those of WAN and
            Qwen-Image are normalised already.
        predict: see the module.
        tiny: a configuration of the real class that runs on a CPU; its text widths are those of the caches.
    """

    name: str
    transformer: str
    pipeline: str
    suffix: str
    text_key: str
    text_script: str
    shift: float
    lora_targets: list[str]
    predict: Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]
    tiny: dict[str, Any]
    latent_scale: float = 1.0


def predict_wan(transformer: Any, noisy: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
    """text["embeds"]: (B, 512, 4096), zeros after the words."""
    return transformer(noisy, sigma * 1000, text["embeds"].to(noisy.dtype), return_dict=False)[0]


def predict_hunyuan_video(transformer: Any, noisy: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
    """text["embeds"]: (B, S, 4096); text["mask"]: (B, S), True for words; text["pooled"]: (B, 768)."""
    # The distilled guidance is an input of the model. 1 trains what the data says, and not an amplified version of it.
    guidance = torch.full_like(sigma, 1000.0).to(noisy.dtype)
    return transformer(
        noisy,
        sigma * 1000,
        text["embeds"].to(noisy.dtype),
        text["mask"],
        text["pooled"].to(noisy.dtype),
        guidance=guidance,
        return_dict=False,
    )[0]


def predict_qwen_image(transformer: Any, noisy: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
    """text["embeds"]: (B, S, 3584); text["mask"]: (B, S), True for words."""
    batch, _, _, height, width = noisy.shape
    tokens = transformer(
        pack(noisy),
        text["embeds"].to(noisy.dtype),
        text["mask"],
        sigma,  # this model multiplies by 1000 itself
        [[(1, height // 2, width // 2)]] * batch,
        return_dict=False,
    )[0]
    # Unpacked, so that the mask meets latents and not tokens: each of a token's four positions has its own weight.
    return unpack(tokens, height, width)


def pack(latents: Tensor) -> Tensor:
    """(B, C, 1, h, w) to tokens (B, h/2 w/2, 4C): each token is a 2 x 2 patch, channels first."""
    batch, channels, frames, height, width = latents.shape
    if frames != 1 or height % 2 or width % 2:
        raise ValueError(f"latents must be one frame of even height and width, got {tuple(latents.shape)}")
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of height x width."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height // 2, width // 2, features // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, features // 4, 1, height, width)


_FAMILIES = (
    Family(
        name="wan",
        transformer="WanTransformer3DModel",
        pipeline="WanPipeline",
        suffix="wan",
        text_key="varlen_t5",
        text_script="wan_cache_text_encoder_outputs.py",
        shift=3.0,
        lora_targets=[*ATTENTION, "ffn.net.0.proj", "ffn.net.2"],
        predict=predict_wan,
        tiny=dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=64, num_layers=2, rope_max_seq_len=64),
    ),
    Family(
        name="hv",
        transformer="HunyuanVideoTransformer3DModel",
        pipeline="HunyuanVideoPipeline",
        suffix="hv",
        text_key="llm",
        text_script="cache_text_encoder_outputs.py",
        shift=7.0,
        lora_targets=[*ATTENTION, *TEXT_ATTENTION],
        predict=predict_hunyuan_video,
        tiny=dict(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            rope_axes_dim=(4, 4, 4),
        ),
        latent_scale=0.476986,
    ),
    Family(
        name="qwen",
        transformer="QwenImageTransformer2DModel",
        pipeline="QwenImagePipeline",
        suffix="qi",
        text_key="varlen_vl_embed",
        text_script="qwen_image_cache_text_encoder_outputs.py",
        shift=2.2,
        lora_targets=[*ATTENTION, *TEXT_ATTENTION],
        predict=predict_qwen_image,
        tiny=dict(num_attention_heads=2, attention_head_dim=12, num_layers=2, axes_dims_rope=(4, 4, 4)),
    ),
)
FAMILIES = {family.name: family for family in _FAMILIES}


def tiny_transformer(family: Family) -> Any:
    """A tiny transformer of the real class with random weights, float32."""
    return getattr(diffusers, family.transformer)(**family.tiny)


def load_transformer(family: Family, model: str, subfolder: str | None, dtype: torch.dtype) -> Any:
    """The transformer of a pipeline folder or hub id, or of a folder that holds nothing but a transformer.

    Raises:
        UserError: where there is none, or one of another family or with other inputs.
    """
    if subfolder is None:
        subfolder = "" if (Path(model) / "config.json").is_file() else "transformer"
    transformer_class = getattr(diffusers, family.transformer)
    try:
        config = transformer_class.load_config(model, subfolder=subfolder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--model {model}: no transformer can be read ({reason}): give a diffusers folder or id", 2
        ) from error
    if config.get("_class_name") != family.transformer:
        raise UserError(f"--model {model} is a {config.get('_class_name')}, --arch asks for a {family.transformer}", 2)
    channels = 64 if family.name == "qwen" else 16
    if config.get("in_channels", channels) != channels:
        raise UserError(
            f"--model {model} takes {config['in_channels']} input channels, and this example trains text to video or image, "
            f"{channels} channels: use the text-to-video model",
            2,
        )
    return transformer_class.from_pretrained(model, subfolder=subfolder, torch_dtype=dtype)
