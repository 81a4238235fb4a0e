"""THE table of model families: what the trainer calls their caches, scripts and classes. A new family is one entry here."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model family of musubi-tuner.

    Attributes:
        suffixes: short names that end its cache files, one for each kind of model in the family.
        fps: frame rate that clips with `source_fps` are brought to, or None where the trainer takes no clips.
        bucket_step: sides of buckets are multiples of it, pixels.
        caching_script: module of musubi_tuner that writes its latent caches.
        training_script: module of musubi_tuner that trains its LoRAs, or None where masks can only be cached.
        trainers: the names of the trainer's class in that module, of one generation of the trainer and the other.
        network: module of musubi_tuner.networks with its LoRA, or None as above.
    """

    suffixes: tuple[str, ...]
    fps: float | None
    bucket_step: int = 16
    caching_script: str
    training_script: str | None = None
    trainers: tuple[str, ...] = ()
    network: str | None = None


# Source: musubi-tuner 0.3.4, dataset/architectures.py, image_video_dataset.py, bucket.py.
FAMILIES = {
    "hv": Family(
        suffixes=("hv",),
        fps=24.0,
        caching_script="cache_latents",
        training_script="hv_train_network",
        trainers=("HunyuanVideoNetworkTrainer", "NetworkTrainer"),
        network="lora",
    ),
    "hv15": Family(suffixes=("hv15",), fps=24.0, caching_script="hv_1_5_cache_latents"),
    "wan": Family(
        suffixes=("wan",),
        fps=16.0,
        caching_script="wan_cache_latents",
        training_script="wan_train_network",
        trainers=("WanNetworkTrainer",),
        network="lora_wan",
    ),
    "qwen": Family(
        suffixes=("qi", "qie", "qil"),
        fps=None,
        caching_script="qwen_image_cache_latents",
        training_script="qwen_image_train_network",
        trainers=("QwenImageNetworkTrainer",),
        network="lora_qwen_image",
    ),
}


def trained() -> tuple[str, ...]:
    """Returns the names of the families that can be trained with masks, not only cached."""
    return tuple(name for name, family in FAMILIES.items() if family.training_script is not None)


def family_of(suffix: str) -> str | None:
    """Returns the name of the family whose caches end in this short name, or None."""
    return next((name for name, family in FAMILIES.items() if suffix in family.suffixes), None)
