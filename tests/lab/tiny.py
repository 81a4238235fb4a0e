"""Shrinks the WAN, HunyuanVideo and Qwen-Image models of musubi-tuner and lets them run where there is no GPU.

Call `install()` before the trainer is imported: a module is changed when it is first imported. Datasets, caches, batches, the loss,
backward and the optimizer stay the trainer's.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from typing import Any

WAN = {"dim": 64, "ffn_dim": 128, "num_heads": 2, "num_layers": 2}
WAN_VAE_DIM = 8
HV = {
    "hidden_size": 64,
    "heads_num": 2,
    "mm_double_blocks_depth": 2,
    "mm_single_blocks_depth": 2,
    "rope_dim_list": [8, 12, 12],
}
HV_VAE_CHANNELS = [32, 32, 32, 32]
QWEN = {"attention_head_dim": 32, "num_attention_heads": 2, "axes_dims_rope": (8, 12, 12), "num_layers": 2}
QWEN_VAE_DIM = 8


def _torch(torch: Any) -> None:
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: 0  # WAN's text encoder asks for it in a default argument, at import
    functional = torch.nn.functional

    def in_float32(convolve: Callable[..., Any]) -> Callable[..., Any]:
        """Half-precision convolutions are slow or missing on a CPU; only the VAEs of the caching scripts come here."""

        @functools.wraps(convolve)
        def convolution(input, weight, bias=None, *rest, **named):
            half = weight.dtype in (torch.bfloat16, torch.float16)
            if torch.is_grad_enabled() or input.device.type != "cpu" or not half:
                return convolve(input, weight, bias, *rest, **named)
            with torch.amp.autocast("cpu", enabled=False):
                bias = None if bias is None else bias.float()
                return convolve(input.float(), weight.float(), bias, *rest, **named).to(weight.dtype)

        return convolution

    functional.conv2d, functional.conv3d = in_float32(functional.conv2d), in_float32(functional.conv3d)
    layer_norm = functional.layer_norm

    @functools.wraps(layer_norm)
    def mixed_layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
        """On a GPU autocast takes float32 input with bfloat16 parameters; on a CPU it raises."""
        if weight is not None and weight.dtype != input.dtype and input.device.type == "cpu":
            weight, bias = weight.to(input.dtype), None if bias is None else bias.to(input.dtype)
        return layer_norm(input, normalized_shape, weight, bias, eps)

    functional.layer_norm = mixed_layer_norm


def _after_init(cls: type, before: Callable[[dict], None] | None = None, after: Callable[[Any], None] | None = None):
    """Wraps the constructor of `cls`: `before` edits its keyword arguments, `after` the object."""
    init = cls.__init__

    @functools.wraps(init)
    def __init__(self, *given, **named):
        if before:
            before(named)
        init(self, *given, **named)
        if after:
            after(self)

    cls.__init__ = __init__


def _wan_configs(module: Any) -> None:
    for config in module.WAN_CONFIGS.values():
        config.update(WAN)


def _wan_model(module: Any) -> None:
    """Computes the time embedding in float32, as `autocast(dtype=float32)` does on a GPU; a CPU's autocast refuses that dtype."""
    import torch

    def float32(linear):
        def forward(x):
            with torch.amp.autocast("cpu", enabled=False):
                bias = None if linear.bias is None else linear.bias.float()
                return torch.nn.functional.linear(x.float(), linear.weight.float(), bias)

        return forward

    def time_embedding(model):
        for layer in (*model.time_embedding, *model.time_projection):
            if isinstance(layer, torch.nn.Linear):
                layer.forward = float32(layer)

    if not torch.cuda.is_available():
        _after_init(module.WanModel, after=time_embedding)


def _wan_vae(module: Any) -> None:
    module._video_vae = functools.partial(module._video_vae, dim=WAN_VAE_DIM)


def _hv_attention(module: Any) -> None:
    """Gives lengths on the CPU: the trainer asks for a CUDA tensor, and scaled_dot_product_attention never reads its values."""
    import torch

    if not torch.cuda.is_available():
        module.get_cu_seqlens = lambda mask, _: torch.zeros(2 * len(mask) + 1, dtype=torch.int32)


def _hv_models(module: Any) -> None:
    for config in module.HUNYUAN_VIDEO_CONFIG.values():
        config.update(HV)


def _hv_vae(module: Any) -> None:
    original = module.AutoencoderKLCausal3D.from_config

    def from_config(_, config=None, *rest, **named):
        return original({**config, "block_out_channels": HV_VAE_CHANNELS}, *rest, **named)

    module.AutoencoderKLCausal3D.from_config = classmethod(from_config)


def _qwen_model(module: Any) -> None:
    _after_init(module.QwenImageTransformer2DModel, before=lambda named: named.update(QWEN))


def _qwen_vae(module: Any) -> None:
    _after_init(module.AutoencoderKLQwenImage, before=lambda named: named.update(base_dim=QWEN_VAE_DIM))


PATCHES: dict[str, Callable[[Any], None]] = {
    "torch": _torch,
    "musubi_tuner.wan.configs": _wan_configs,
    "musubi_tuner.wan.modules.model": _wan_model,
    "musubi_tuner.wan.modules.vae": _wan_vae,
    "musubi_tuner.hunyuan_model.attention": _hv_attention,
    "musubi_tuner.hunyuan_model.models": _hv_models,
    "musubi_tuner.hunyuan_model.autoencoder_kl_causal_3d": _hv_vae,
    "musubi_tuner.qwen_image.qwen_image_model": _qwen_model,
    "musubi_tuner.qwen_image.qwen_image_autoencoder_kl": _qwen_vae,
}


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name in PATCHES else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            execute(module)
            PATCHES[name](module)

        spec.loader.exec_module = execute_and_patch
        return spec


def install() -> None:
    """Changes the modules that are imported already, and the others when they are."""
    for name, patch in PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])
    sys.meta_path.insert(0, _Finder())
