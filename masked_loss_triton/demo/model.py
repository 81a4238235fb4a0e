"""The tiny WAN transformer, its LoRA, and the files both are saved in."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor

from masked_loss_triton.demo.encoder import CHANNELS
from masked_loss_triton.demo.output import write_tensors

Model: TypeAlias = Any  # a WanTransformer3DModel: diffusers' lazy imports hide from type checkers that it is a Module
WORD_TOKENS = 2
TEXT_WIDTH = 32
MODEL_CONFIG = {
    "patch_size": (1, 1, 1),
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 64,
    "ffn_dim": 288,
    "num_layers": 4,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 64,
}
LORA_RANK = 16
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def build_model(seed: int, device: torch.device) -> Model:
    """A freshly initialised transformer: the real architecture, 0.6 million parameters. The same seed, the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Model = WanTransformer3DModel(**MODEL_CONFIG)
    return model.to(device)


def with_lora(base: Model, seed: int) -> Model:
    """A copy of `base`, frozen, with a new LoRA on every attention and feed-forward matrix; `base` stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Model = WanTransformer3DModel.from_config(base.config)
        model.load_state_dict(base.state_dict())
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS))
    return model.to(base.device)


def save_lora(model: Model, path: Path) -> None:
    """Writes the LoRA as diffusers' pipelines do: keys under `transformer.`, alpha in the metadata.

    `model.save_lora_adapter` is not used: it writes neither the prefix that `load_lora_adapter` expects by default nor the
    same bytes on every run.
    """
    layers = get_peft_model_state_dict(model, adapter_name="default")
    tensors = {f"transformer.{name}": value.detach().float().cpu().numpy() for name, value in layers.items()}
    adapter = {"r": LORA_RANK, "lora_alpha": LORA_RANK, "target_modules": LORA_TARGETS}
    metadata = {f"transformer.{name}": value for name, value in adapter.items()}
    write_tensors(path, tensors, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)})


def word(name: str) -> Tensor:
    """What stands for one word of a caption: float32 (2, 32), random but always the same for one name.

    No text encoder can be shipped either; all the model needs is to tell one subject and one place from another.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(WORD_TOKENS, TEXT_WIDTH, generator=generator)


def captions(pairs: Iterable[tuple[str, str]], device: torch.device | str = "cpu") -> Tensor:
    """The captions "SUBJECT, PLACE": float32 (number of pairs, 4, 32)."""
    return torch.stack([torch.cat([word(subject), word(place)]) for subject, place in pairs]).to(device)


def predict(model: Model, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
    """The predicted velocity, (B, C, F, H, W), for noisy latents of that shape at times in (0, 1), shape (B,)."""
    return model(noisy, time * 1000, text, return_dict=False)[0]


@torch.no_grad()
def sample(model: Model, noise: Tensor, text: Tensor, steps: int = 30) -> Tensor:
    """Latents drawn from `noise`, (B, C, F, H, W), by Euler's method in steps of equal size, under captions (B, 4, 32)."""
    latents = noise
    for step in range(steps):
        time = torch.full((len(latents),), 1 - step / steps, device=latents.device)
        latents = latents - predict(model, latents, time, text) / steps
    return latents
