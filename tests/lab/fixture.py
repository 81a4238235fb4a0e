"""Data to train on: pictures, clips, masks, captions, tiny random weights, and caches that the trainer's own scripts wrote.

    MUSUBI_REPO=... python -m tests.lab.fixture FOLDER

Latents come from the trainer's caching scripts with tiny random VAEs; text caches are random tensors of the real shapes, saved by
the trainer's own functions for the items that its own datasets list. `ensure_fixture` makes the folder once and keeps it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.lab import models, pictures, tiny

ROOT = Path(__file__).parents[2]
RESOLUTION = {"image": (256, 256), "video": (128, 128)}


@dataclass(frozen=True)
class Family:
    """What the trainer calls a model family, and the flags of a usual run.

    Attributes:
        script: name of the training script and of its module.
        caching: the same of the script that caches latents.
        suffix: ends the names of caches.
        network: module of the trainer's own LoRA.
        vae: the VAE's weights, FAMILY_vae_DTYPE; "" where pixels are cached.
        flags: for the training script.
        kinds: of datasets.
        keys: lines of the dataset file; {fixture} is its folder.
        caching_flags: for the caching script; {fixture} as above.
        arch: the name in our table, where it is another one than here.
    """

    script: str
    caching: str
    suffix: str
    network: str
    vae: str
    flags: tuple[str, ...]
    kinds: tuple[str, ...] = ("image", "video")
    keys: tuple[str, ...] = ()
    caching_flags: tuple[str, ...] = ()
    arch: str = ""


SHIFT = ("--timestep_sampling", "shift", "--discrete_flow_shift")
FAMILIES = {
    "wan": Family(
        "wan_train_network", "wan_cache_latents", "wan", "networks.lora_wan", "wan_vae_fp32",
        ("--task", "t2v-1.3B", *SHIFT, "3.0"),
    ),
    "hv": Family("hv_train_network", "cache_latents", "hv", "networks.lora", "hv_vae_fp32", (*SHIFT, "7.0")),
    "qwen": Family(
        "qwen_image_train_network", "qwen_image_cache_latents", "qi", "networks.lora_qwen_image", "qwen_vae_bf16",
        ("--weighting_scheme", "none", *SHIFT, "2.2"), kinds=("image",),
    ),
}  # fmt: skip
CORE = tuple(FAMILIES)  # made with the fixture; the others when they are first asked for
PICTURES = {"kinds": ("image",)}
FAMILIES |= {
    "wan_i2v": Family(
        "wan_train_network", "wan_cache_latents", "wan", "networks.lora_wan", "wan_vae_fp32",
        ("--task", "i2v-A14B", *SHIFT, "3.0"), kinds=("video",), caching_flags=("--i2v",), arch="wan",
    ),
    "krea2": Family(
        "krea2_train_network", "krea2_cache_latents", "kr2", "networks.lora_krea2", "qwen_vae_bf16", (*SHIFT, "2.2"), **PICTURES
    ),
    "hv15": Family(
        "hv_1_5_train_network", "hv_1_5_cache_latents", "hv15", "networks.lora_hv_1_5", "hv15_vae_fp32", (*SHIFT, "7.0")
    ),
    "framepack": Family(
        "fpack_train_network", "fpack_cache_latents", "fp", "networks.lora_framepack", "hv_vae_fp32",
        ("--split_attn", *SHIFT, "3.0"), kinds=("video",), keys=("target_frames = [9]", "fp_latent_window_size = 1"),
        caching_flags=("--image_encoder", "{fixture}/weights/framepack_siglip_fp32.safetensors"),
    ),
    "kontext": Family(
        "flux_kontext_train_network", "flux_kontext_cache_latents", "fk", "networks.lora_flux", "kontext_vae_fp32",
        ("--timestep_sampling", "flux_shift"), keys=('control_directory = "{fixture}/images"',), **PICTURES,
    ),
    "flux2": Family(
        "flux_2_train_network", "flux_2_cache_latents", "f2k4b", "networks.lora_flux_2", "flux2_vae_fp32",
        ("--timestep_sampling", "flux2_shift", "--model_version", "klein-base-4b"),
        caching_flags=("--model_version", "klein-base-4b"), **PICTURES,
    ),
    "flux2_dev": Family(
        "flux_2_train_network", "flux_2_cache_latents", "f2d", "networks.lora_flux_2", "flux2_dev_vae_fp32",
        ("--timestep_sampling", "flux2_shift"), arch="flux2", **PICTURES,
    ),
    "zimage": Family(
        "zimage_train_network", "zimage_cache_latents", "zi", "networks.lora_zimage", "zimage_vae_fp32", (*SHIFT, "2.0"),
        **PICTURES,
    ),
    "ideogram4": Family(
        "ideogram4_train_network", "ideogram4_cache_latents", "i4", "networks.lora_ideogram4", "ideogram4_vae_fp32", (),
        **PICTURES,
    ),
    "kandinsky5": Family(
        "kandinsky5_train_network", "kandinsky5_cache_latents", "k5", "networks.lora_kandinsky", "hv_vae_fp32",
        ("--task", "k5-lite-t2v-5s-sd", "--override_dit", json.dumps(models.KANDINSKY5), *SHIFT, "5.0"),
    ),
    "hidream": Family(
        "hidream_o1_train_network", "hidream_o1_cache_pixel", "ho1", "networks.lora_hidream_o1", "",
        ("--timestep_sampling", "uniform"), **PICTURES,
    ),
}  # fmt: skip


def ensure_fixture() -> Path:
    """The folder of the fixture, made on first use (about two minutes), in the user's cache folder.

    Its name holds a hash of what makes it: a change of this file, of the models or of the checkout makes another one.
    """
    sources = [Path(__file__), Path(pictures.__file__), Path(tiny.__file__)]
    content = b"".join(path.read_bytes() for path in sources) + os.environ["MUSUBI_REPO"].encode()
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "masked_loss_triton"
    home.mkdir(parents=True, exist_ok=True)
    folder = home / f"lab-{hashlib.sha256(content).hexdigest()[:12]}"
    with open(home / "lab.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            command = [sys.executable, "-m", "tests.lab.fixture", str(folder)]
            made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if made.returncode:
                raise RuntimeError(f"the fixture of the lab was not made:\n{(made.stdout + made.stderr)[-3000:]}")
            (folder / "complete").touch()
    return folder


def ensure_family(fixture: Path, family: str) -> None:
    """Makes the weights and the caches of a family that the fixture has not."""
    content = hashlib.sha256(Path(models.__file__).read_bytes()).hexdigest()[:12]
    marker = fixture / f"complete-{family}-{content}"
    if family in CORE:
        return
    with open(fixture / "families.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not marker.exists():
            command = [sys.executable, "-m", "tests.lab.fixture", str(fixture), family]
            made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if made.returncode:
                raise RuntimeError(f"{family} was not made:\n{(made.stdout + made.stderr)[-3000:]}")
            marker.touch()


def trainer_path() -> None:
    """Makes the checkout importable, with tiny models."""
    sys.path.insert(0, str(Path(os.environ["MUSUBI_REPO"]) / "src"))
    tiny.install()


def weights(fixture: Path, family: str, model: str, dtype: str) -> Path:
    return fixture / "weights" / f"{family}_{model}_{dtype}.safetensors"


def write_toml(
    path: Path,
    fixture: Path,
    caches: Path,
    kinds: Sequence[str],
    batch_size: int = 1,
    masks: Sequence[str] = (),
    images: Path | None = None,
    keys: Sequence[str] = (),
) -> Path:
    """Writes the trainer's dataset file.

    Args:
        path: the file.
        fixture: the folder of pictures and clips.
        caches: the folder with a folder of caches for each kind.
        kinds: "image" or "video", each a dataset.
        masks: a folder of the fixture for each kind, as key `mask_directory` of ours; none without.
        images: the folder of pictures, `fixture / "images"` when None.
        keys: more lines for every dataset.
    """
    lines = ["[general]", 'caption_extension = ".txt"', "enable_bucket = true", f"batch_size = {batch_size}"]
    for index, kind in enumerate(kinds):
        folder = images if images and kind == "image" else fixture / f"{kind}s"
        lines += ["[[datasets]]", f"resolution = {list(RESOLUTION[kind])}", f'{kind}_directory = "{folder}"']
        lines += [f'cache_directory = "{caches / kind}"', *(key.format(fixture=fixture) for key in keys)]
        if kind == "video":
            lines += ['frame_extraction = "head"']
            lines += [] if any(key.startswith("target_frames") for key in keys) else ["target_frames = [1, 9]"]
        if index < len(masks):
            lines += [f'mask_directory = "{fixture / masks[index]}"']
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fills all parameters with random values, the zero-initialised outputs too, so that gradients reach every LoRA."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            random = torch.randn(value.shape, generator=generator)
            scale = value[0].numel() ** -0.5 if value.ndim >= 2 else 0.05
            value.copy_(scale * random + (value.ndim < 2 and "bias" not in name))
    return model


def save_weights(
    model: torch.nn.Module, fixture: Path, family: str, name: str, *dtypes: str, metadata: dict[str, str] | None = None
) -> None:
    for dtype in dtypes:
        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
        tensors = {key: value.detach().to(kind).contiguous() for key, value in model.state_dict().items()}
        save_file(tensors, weights(fixture, family, name, dtype), metadata)


def write_weights(fixture: Path) -> None:
    """Random weights of the tiny models, in the files and dtypes that the trainers read."""
    (fixture / "weights").mkdir(parents=True, exist_ok=True)

    def save(model: torch.nn.Module, family: str, name: str, *dtypes: str) -> None:
        save_weights(model, fixture, family, name, *dtypes)

    torch.manual_seed(0)
    from musubi_tuner.hunyuan_model.autoencoder_kl_causal_3d import AutoencoderKLCausal3D
    from musubi_tuner.hunyuan_model.models import load_dit_model
    from musubi_tuner.qwen_image.qwen_image_autoencoder_kl import AutoencoderKLQwenImage
    from musubi_tuner.qwen_image.qwen_image_model import QwenImageTransformer2DModel
    from musubi_tuner.wan.configs import WAN_CONFIGS
    from musubi_tuner.wan.modules.model import WanModel
    from musubi_tuner.wan.modules.vae import WanVAE_

    config = WAN_CONFIGS["t2v-1.3B"]
    names = ("dim", "eps", "ffn_dim", "freq_dim", "in_dim", "num_heads", "num_layers", "out_dim", "text_len")
    wan = WanModel(model_type="t2v", attn_mode="torch", **{name: getattr(config, name) for name in names})
    save(randomise(wan, 1), "wan", "dit", "bf16", "fp32")
    vae = WanVAE_(
        dim=tiny.WAN_VAE_DIM, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[],
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    save(randomise(vae, 2), "wan", "vae", "fp32")

    factory = {"device": "cpu", "dtype": torch.float32, "attn_mode": "torch", "split_attn": False}
    save(randomise(load_dit_model(4096, 768, 16, 16, factory), 3), "hv", "dit", "bf16")
    vae = AutoencoderKLCausal3D.from_config(
        {
            "act_fn": "silu", "down_block_types": ["DownEncoderBlockCausal3D"] * 4, "in_channels": 3,
            "up_block_types": ["UpDecoderBlockCausal3D"] * 4, "latent_channels": 16, "layers_per_block": 2,
            "norm_num_groups": 32, "out_channels": 3, "sample_size": 256, "sample_tsize": 64,
            "scaling_factor": 0.476986, "time_compression_ratio": 4, "mid_block_add_attention": True,
        }
    )  # fmt: skip
    save(randomise(vae, 4), "hv", "vae", "fp32")
    save(randomise(QwenImageTransformer2DModel(), 5), "qwen", "dit", "bf16")
    save(randomise(AutoencoderKLQwenImage(), 6), "qwen", "vae", "bf16")


def cache_latents(fixture: Path, family: str, toml: Path) -> None:
    """Runs the trainer's own caching script in this process."""
    names = FAMILIES[family]
    module = importlib.import_module(f"musubi_tuner.{names.caching}")
    torch.manual_seed(0)  # HunyuanVideo's script draws its latents from the VAE's posterior
    sys.argv = [f"{names.caching}.py", "--dataset_config", str(toml), "--device", "cpu"]
    sys.argv += ["--vae", str(fixture / "weights" / f"{names.vae}.safetensors")] if names.vae else []
    sys.argv += [flag.format(fixture=fixture) for flag in names.caching_flags]
    module.main()


def cache_text(family: str, toml: Path) -> None:
    """Writes random text caches, of different lengths, the same for the same item in every run."""
    from musubi_tuner.dataset import config_utils
    from musubi_tuner.dataset import image_video_dataset as saving

    generator = config_utils.BlueprintGenerator(config_utils.ConfigSanitizer())
    config = config_utils.load_user_config(str(toml))
    args = argparse.Namespace(debug_dataset=False)
    blueprint = generator.generate(config, args, architecture=FAMILIES[family].suffix)
    datasets = config_utils.generate_dataset_group_by_blueprint(blueprint.dataset_group).datasets
    for dataset in datasets:
        batches = dataset.retrieve_text_encoder_output_cache_batches(1)
        for index, item in enumerate(item for batch in batches for item in batch):
            random = torch.Generator().manual_seed(zlib.crc32(item.item_key.encode()))
            length = 8 + index % 5
            if family == "wan":
                saving.save_text_encoder_output_cache_wan(item, torch.randn(length, 4096, generator=random).bfloat16())
            elif family == "hv":
                mask = (torch.arange(256) < 20 + length).long()
                text = torch.randn(256, 4096, generator=random).half()
                saving.save_text_encoder_output_cache(item, text, mask, True)
                saving.save_text_encoder_output_cache(item, torch.randn(768, generator=random).half(), None, False)
            elif family == "qwen":
                text = torch.randn(length, 3584, generator=random).bfloat16()
                saving.save_text_encoder_output_cache_qwen_image(item, text)
            else:
                models.save_text(family, importlib.import_module("musubi_tuner.dataset.cache_io"), item, random, length)


def main(folder: str, family: str = "") -> None:
    """Makes the fixture; each family's caches in a process of their own, since the scripts are written to run once."""
    fixture = Path(folder).absolute()
    trainer_path()
    if family:
        caches, names = fixture / "cache" / family, FAMILIES[family]
        toml = write_toml(fixture / f"{family}.toml", fixture, caches, names.kinds, keys=names.keys)
        if family not in CORE:
            shutil.rmtree(caches, ignore_errors=True)
            torch.manual_seed(7)
            models.WEIGHTS[family](
                lambda model, name, *dtypes, **named: save_weights(
                    randomise(model, 8), fixture, family, name, *dtypes, **named
                )
            )
        cache_latents(fixture, family, toml)
        cache_text(family, toml)
        return
    pictures.write_pictures(fixture)
    pictures.write_clips(fixture)
    write_weights(fixture)
    for name in CORE:
        subprocess.run([sys.executable, "-m", "tests.lab.fixture", str(fixture), name], cwd=ROOT, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
