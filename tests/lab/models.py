"""Tiny random weights and random text caches of the families beyond WAN, HunyuanVideo and Qwen-Image."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

Save = Callable[..., None]
TEXT = 64  # width of text features, where the trainer does not fix it


def _module(name: str) -> Any:
    return importlib.import_module(f"musubi_tuner.{name}")


def wan_image_to_video(save: Save) -> None:
    """WAN 2.2, which sees the first frame beside the noise."""
    config = _module("wan.configs").WAN_CONFIGS["i2v-A14B"]
    names = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
    given = {name: getattr(config, name) for name in names}
    model = _module("wan.modules.model").WanModel(model_type="i2v", model_version="2.2", attn_mode="torch", **given)
    save(model, "dit", "bf16")


def krea2(save: Save) -> None:
    utils = _module("krea2.krea2_utils")
    save(utils.SingleStreamDiT(utils.single_mmdit_large_wide), "dit", "bf16")


def hunyuan_video_15(save: Save) -> None:
    save(_module("hunyuan_video_1_5.hunyuan_video_1_5_models").HunyuanVideo_1_5_DiffusionTransformer(), "dit", "bf16")
    vae = _module("hunyuan_video_1_5.hunyuan_video_1_5_vae")
    model = vae.AutoencoderKLConv3D(
        in_channels=3, out_channels=3, latent_channels=vae.VAE_LATENT_CHANNELS, block_out_channels=(32, 32, 64, 64, 64),
        layers_per_block=2, ffactor_spatial=16, ffactor_temporal=4, sample_size=256, sample_tsize=64,
        scaling_factor=vae.VAE_SCALING_FACTOR, shift_factor=None, downsample_match_channel=True,
        upsample_match_channel=True,
    )  # fmt: skip
    save(model, "vae", "fp32")


def framepack(save: Save) -> None:
    packed, utils = _module("frame_pack.hunyuan_video_packed"), _module("frame_pack.framepack_utils")
    model = packed.HunyuanVideoTransformer3DModelPacked(
        attention_head_dim=32, guidance_embeds=True, has_clean_x_embedder=True, has_image_proj=True, image_proj_dim=TEXT,
        num_attention_heads=2, num_layers=1, num_refiner_layers=1, num_single_layers=1, rope_axes_dim=(8, 12, 12),
        text_embed_dim=TEXT, attn_mode="torch",
    )  # fmt: skip
    save(model, "dit", "bf16")
    save(utils.SiglipVisionModel(utils.SiglipVisionConfig(**utils.IMAGE_ENCODER_CONFIG)), "siglip", "fp32")


def flux_kontext(save: Save) -> None:
    models = _module("flux.flux_models")
    spec = models.configs_flux_dev_context
    save(models.Flux(spec.params, "torch", False), "dit", "bf16")
    save(models.AutoEncoder(spec.ae_params), "vae", "fp32")


def flux_2(version: str) -> Callable[[Save], None]:
    def write(save: Save) -> None:
        models, utils = _module("flux_2.flux2_models"), _module("flux_2.flux2_utils")
        save(models.Flux2(utils.FLUX2_MODEL_INFO[version].params, "torch", False), "dit", "bf16")
        save(models.AutoEncoder(models.AutoEncoderParams()), "vae", "fp32")

    return write


def z_image(save: Save) -> None:
    save(_module("zimage.zimage_model").create_model("torch", False, None).to_empty(device="cpu"), "dit", "bf16")
    vae = _module("zimage.zimage_autoencoder").AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4, layers_per_block=2, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, mid_block_add_attention=True, in_channels=3, out_channels=3, norm_num_groups=32,
        scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    save(vae, "vae", "fp32")


def ideogram4(save: Save) -> None:
    model, ae = _module("ideogram4.ideogram4_model"), _module("ideogram4.ideogram4_autoencoder")
    dit = model.Ideogram4Transformer(model.Ideogram4Config(), attn_mode="torch", split_attn=False)
    save(dit, "dit", "bf16", metadata={"model_type": "ideogram4_cond"})
    save(ae.AutoEncoder(ae.AutoEncoderParams()), "vae", "fp32")


KANDINSKY5 = {
    "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": TEXT, "in_text_dim2": TEXT, "time_dim": 32,
    "patch_size": (1, 2, 2), "model_dim": 64, "ff_dim": 128, "num_text_blocks": 1, "num_visual_blocks": 2,
    "axes_dims": (8, 12, 12), "visual_cond": True,
}  # fmt: skip


def kandinsky5(save: Save) -> None:
    save(_module("kandinsky5.models.dit").get_dit({**KANDINSKY5, "attention_engine": "sdpa"}), "dit", "bf16")


HIDREAM = {
    "text_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512, "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    },
    "vision_config": {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
        "deepstack_visual_indexes": [], "num_position_embeddings": 16,
    },
    "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503,
}  # fmt: skip


def hidream(save: Save) -> None:
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

    model = _module("hidream_o1.qwen3_vl_transformers").Qwen3VLForConditionalGeneration(Qwen3VLConfig(**HIDREAM))
    model.lm_head = torch.nn.Identity()
    save(model, "dit", "bf16")


WEIGHTS: dict[str, Callable[[Save], None]] = {
    "wan_i2v": wan_image_to_video,
    "krea2": krea2,
    "hv15": hunyuan_video_15,
    "framepack": framepack,
    "kontext": flux_kontext,
    "flux2": flux_2("klein-base-4b"),
    "flux2_dev": flux_2("dev"),
    "zimage": z_image,
    "ideogram4": ideogram4,
    "kandinsky5": kandinsky5,
    "hidream": hidream,
}


def save_text(family: str, io: Any, item: Any, random: torch.Generator, length: int) -> None:
    """Saves a random text cache by the trainer's own function.

    Args:
        io: its module dataset.cache_io.
        length: number of words.
    """

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random).bfloat16()

    if family == "wan_i2v":
        io.save_text_encoder_output_cache_wan(item, draw(length, 4096))
    elif family == "krea2":
        io.save_text_encoder_output_cache_krea2(item, draw(length, 3, TEXT))
    elif family == "hv15":
        io.save_text_encoder_output_cache_hunyuan_video_1_5(item, draw(length, TEXT), draw(4 + length % 3, TEXT))
    elif family == "framepack":
        mask = (torch.arange(32) < length).long()
        io.save_text_encoder_output_cache_framepack(item, draw(32, TEXT), mask, draw(768))
    elif family == "kontext":
        io.save_text_encoder_output_cache_flux_kontext(item, draw(16, TEXT), draw(768))
    elif family == "flux2":
        io.save_text_encoder_output_cache_flux_2(item, draw(16, TEXT), "flux_2_klein_4b")
    elif family == "flux2_dev":
        io.save_text_encoder_output_cache_flux_2(item, draw(16, TEXT), "flux_2_dev")
    elif family == "zimage":
        io.save_text_encoder_output_cache_z_image(item, draw(length, TEXT))
    elif family == "ideogram4":
        io.save_text_encoder_output_cache_ideogram4(item, draw(length, TEXT))
    elif family == "kandinsky5":
        io.save_text_encoder_output_cache_kandinsky5(item, draw(16, TEXT), draw(TEXT), torch.ones(16))
    else:
        io.save_text_encoder_output_cache_hidream_o1(item, torch.randint(0, 400, (length,), generator=random))
