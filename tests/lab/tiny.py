"""Shrinks the models of musubi-tuner and lets them run where there is no GPU.

Call `install()` before the trainer is imported: a module is changed when it is first imported. Datasets, caches, batches, the loss,
backward and the optimizer stay the trainer's.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
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


def _siglip(module: Any) -> None:
    module.IMAGE_ENCODER_CONFIG.update(
        hidden_size=64, intermediate_size=64, num_attention_heads=2, num_hidden_layers=1, image_size=56
    )
    module.FEATURE_EXTRACTOR_CONFIG["size"] = {"height": 56, "width": 56}


def _hidream(module: Any) -> None:
    """Without the tokenizer and the configuration that the trainer would fetch."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLConfig

    from tests.lab.models import HIDREAM

    module.load_processor = lambda *given, **named: None
    Qwen3VLConfig.from_pretrained = classmethod(lambda cls, *given, **named: cls(**HIDREAM))


def _hidream_model(module: Any) -> None:
    """What later versions of transformers no longer list, or call by another name."""
    import inspect

    import torch

    create, takes = module.create_causal_mask, inspect.signature(module.create_causal_mask).parameters
    if "input_embeds" not in takes:

        def create_causal_mask(*given: Any, input_embeds: Any, past_key_values: Any, **named: Any) -> Any:
            named |= {"inputs_embeds": input_embeds, "cache": past_key_values, "past_key_values": past_key_values}
            return create(*given, **{key: named[key] for key in named if key in takes})

        module.create_causal_mask = create_causal_mask

    def frequencies(config: Any, device: Any = None, **named: Any) -> tuple[Any, float]:
        theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
        return theta ** -(torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim), 1.0

    module.ROPE_INIT_FUNCTIONS.setdefault("default", frequencies)


# Numbers that stand in the middle of the trainer's functions: its source is read with smaller ones.
EDITS: dict[str, dict[str, str]] = {
    "musubi_tuner.krea2.krea2_utils": {
        "features=6144": "features=64",
        "txtdim=2560": "txtdim=64",
        " heads=48": " heads=2",
        " kvheads=12": " kvheads=1",
        "layers=28": "layers=2",
        "txtheads=20": "txtheads=2",
        "txtkvheads=20": "txtkvheads=2",
        "txtlayers=12": "txtlayers=3",
    },
    "musubi_tuner.hunyuan_video_1_5.hunyuan_video_1_5_models": {
        "self.hidden_size = 2048": "self.hidden_size = 64",
        "self.heads_num = 16": "self.heads_num = 2",
        "self.rope_dim_list = [16, 56, 56]": "self.rope_dim_list = [8, 12, 12]",
        "mm_double_blocks_depth = 54": "mm_double_blocks_depth = 2",
        "text_states_dim = 3584": "text_states_dim = 64",
        "in_dim=1472, out_dim=2048, hidden_dim=2048": "in_dim=64, out_dim=64, hidden_dim=64",
    },
    "musubi_tuner.hunyuan_video_1_5.hunyuan_video_1_5_vae": {"(128, 256, 512, 1024, 1024)": "(32, 32, 64, 64, 64)"},
    "musubi_tuner.frame_pack.hunyuan_video_packed": {
        "attention_head_dim=128": "attention_head_dim=32",
        "image_proj_dim=1152,\n            in_channels": "image_proj_dim=64,\n            in_channels",
        "num_attention_heads=24": "num_attention_heads=2",
        "num_layers=20": "num_layers=1",
        "num_refiner_layers=2,\n            num_single_layers=40": "num_refiner_layers=1,\n            num_single_layers=1",
        "rope_axes_dim=(16, 56, 56)": "rope_axes_dim=(8, 12, 12)",
        "text_embed_dim=4096": "text_embed_dim=64",
    },
    "musubi_tuner.flux.flux_models": {
        "context_in_dim=4096": "context_in_dim=64",
        "hidden_size=3072": "hidden_size=64",
        "num_heads=24": "num_heads=2",
        "depth=19": "depth=1",
        "depth_single_blocks=38": "depth_single_blocks=1",
        "axes_dim=[16, 56, 56]": "axes_dim=[8, 12, 12]",
        "ch=128": "ch=32",
    },
    "musubi_tuner.flux_2.flux2_models": {"    ch: int = 128": "    ch: int = 32"},
    "musubi_tuner.flux_2.flux2_utils": {
        f"params={name}()": f"params={name}(context_in_dim=64, hidden_size=64, num_heads=2, depth=1, "
        "depth_single_blocks=1, axes_dim=[8, 8, 8, 8])"
        for name in ("Klein4BParams", "Klein9BParams", "Flux2Params")
    },
    "musubi_tuner.zimage.zimage_config": {
        "ROPE_AXES_DIMS = [32, 48, 48]": "ROPE_AXES_DIMS = [8, 12, 12]",
        "DEFAULT_TRANSFORMER_DIM = 3840": "DEFAULT_TRANSFORMER_DIM = 64",
        "N_LAYERS = 30": "N_LAYERS = 2",
        "N_REFINER_LAYERS = 2": "N_REFINER_LAYERS = 1",
        "N_HEADS = 30": "N_HEADS = 2",
        "N_KV_HEADS = 30": "N_KV_HEADS = 2",
        "CAP_FEAT_DIM = 2560": "CAP_FEAT_DIM = 64",
    },
    "musubi_tuner.zimage.zimage_autoencoder": {"(128, 256, 512, 512)": "(32, 32, 32, 32)"},
    "musubi_tuner.ideogram4.ideogram4_model": {
        "emb_dim: int = 4608": "emb_dim: int = 64",
        "num_layers: int = 34": "num_layers: int = 2",
        "num_heads: int = 18": "num_heads: int = 2",
        "intermediate_size: int = 12288": "intermediate_size: int = 128",
        "adanln_dim: int = 512": "adanln_dim: int = 32",
        "4096 * len(QWEN3_VL_ACTIVATION_LAYERS)": "64",
        "(24, 20, 20)": "(6, 5, 5)",
    },
}

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
    "musubi_tuner.frame_pack.framepack_utils": _siglip,
    "musubi_tuner.hidream_o1.hidream_o1_utils": _hidream,
    "musubi_tuner.hidream_o1.qwen3_vl_transformers": _hidream_model,
}


def _execute(module: Any) -> None:
    """Runs a module of the trainer from its source with `EDITS`; a number that is not there is an error."""
    path = Path(module.__spec__.origin)
    source = path.read_text(encoding="utf-8")
    for old, new in EDITS[module.__name__].items():
        if old not in source:
            raise AssertionError(f"{path} has no {old!r}: the trainer is of another version")
        source = source.replace(old, new)
    exec(compile(source, str(path), "exec"), module.__dict__)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        wanted = name in PATCHES or name in EDITS
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if wanted else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_patch(module):
            (_execute if name in EDITS else execute)(module)
            PATCHES.get(name, lambda module: None)(module)

        spec.loader.exec_module = execute_and_patch
        return spec


def install() -> None:
    """Changes the modules that are imported already, and the others when they are."""
    for name, patch in PATCHES.items():
        if name in sys.modules:
            patch(sys.modules[name])
    sys.meta_path.insert(0, _Finder())
