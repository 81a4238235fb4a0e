"""THE table of model families: what the trainer calls their caches, scripts and classes. A new family is one entry here."""

from __future__ import annotations

import dataclasses
import difflib

from masked_loss_triton.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One model family of musubi-tuner.

    Attributes:
        suffixes: short names that end its cache files, one for each kind of model in the family.
        fps: frame rate that clips with `source_fps` are brought to, or None where the trainer takes no clips.
        bucket_step: sides of buckets are multiples of it, pixels.
        caching_script: module of musubi_tuner that writes its latent caches.
        training_script: module of musubi_tuner that trains its LoRAs.
        trainers: the names of the trainer's class in that module, of one generation of the trainer and the other.
        whole_model: module and class that train the whole model and ask `call_dit` for what the loss compares, or empty.
        network: module of musubi_tuner.networks with its LoRA.
        latent_axes: of a cached latent, in the order in which they lie: C channels, F frames, H and W cells.
        loss_axes: of what the loss compares, without the batch; N is all cells, row by row.
        sections: whether a clip's window is cached in sections, each a file of its own.
        given_mask: first and last channel, as a slice, of image-to-video's `latents_image` that are 1 where a frame is given.
        given_first: whether image-to-video is given its first frame, without such channels.
        weighting_scheme: whether the trainer's loss is multiplied by its --weighting_scheme.
    """

    suffixes: tuple[str, ...]
    fps: float | None = None
    bucket_step: int = 16
    caching_script: str
    training_script: str = ""
    trainers: tuple[str, ...] = ()
    whole_model: tuple[str, ...] = ()
    network: str = ""
    latent_axes: str = "CFHW"
    loss_axes: str = "CFHW"
    sections: bool = False
    weighting_scheme: bool = True
    given_mask: tuple[int, int | None] | None = None
    given_first: bool = False


# Source: musubi-tuner 0.3.4, dataset/architectures.py, cache_io.py, image_video_dataset.py, bucket.py.
FAMILIES = {
    "hv": Family(
        suffixes=("hv",),
        fps=24.0,
        caching_script="cache_latents",
        training_script="hv_train_network",
        trainers=("HunyuanVideoNetworkTrainer", "NetworkTrainer"),
        given_first=True,
        network="lora",
    ),
    "hv15": Family(
        suffixes=("hv15",),
        fps=24.0,
        caching_script="hv_1_5_cache_latents",
        training_script="hv_1_5_train_network",
        trainers=("HunyuanVideo15NetworkTrainer",),
        given_mask=(-1, None),
        network="lora_hv_1_5",
    ),
    "wan": Family(
        suffixes=("wan",),
        fps=16.0,
        caching_script="wan_cache_latents",
        training_script="wan_train_network",
        trainers=("WanNetworkTrainer",),
        given_mask=(0, 4),
        network="lora_wan",
    ),
    "qwen": Family(
        suffixes=("qi", "qie", "qil"),
        caching_script="qwen_image_cache_latents",
        training_script="qwen_image_train_network",
        trainers=("QwenImageNetworkTrainer",),
        whole_model=("qwen_image_train", "QwenImageTrainer"),
        network="lora_qwen_image",
    ),
    "krea2": Family(
        suffixes=("kr2",),
        caching_script="krea2_cache_latents",
        training_script="krea2_train_network",
        trainers=("Krea2NetworkTrainer",),
        network="lora_krea2",
    ),
    "kontext": Family(
        suffixes=("fk",),
        caching_script="flux_kontext_cache_latents",
        training_script="flux_kontext_train_network",
        trainers=("FluxKontextNetworkTrainer",),
        network="lora_flux",
        latent_axes="CHW",
        loss_axes="CHW",
    ),
    "flux2": Family(
        suffixes=("f2d", "f2k4b", "f2k9b"),
        caching_script="flux_2_cache_latents",
        training_script="flux_2_train_network",
        trainers=("Flux2NetworkTrainer",),
        network="lora_flux_2",
        latent_axes="CHW",
        loss_axes="CHW",
    ),
    "zimage": Family(
        suffixes=("zi",),
        caching_script="zimage_cache_latents",
        training_script="zimage_train_network",
        trainers=("ZImageNetworkTrainer",),
        whole_model=("zimage_train", "ZImageTrainer"),
        network="lora_zimage",
        latent_axes="CHW",
        loss_axes="CHW",
    ),
    "ideogram4": Family(
        suffixes=("i4",),
        caching_script="ideogram4_cache_latents",
        training_script="ideogram4_train_network",
        trainers=("Ideogram4NetworkTrainer",),
        network="lora_ideogram4",
        latent_axes="CHW",
        loss_axes="CHW",
        weighting_scheme=False,
    ),
    "kandinsky5": Family(
        suffixes=("k5",),
        fps=24.0,
        caching_script="kandinsky5_cache_latents",
        training_script="kandinsky5_train_network",
        trainers=("Kandinsky5NetworkTrainer",),
        network="lora_kandinsky",
        loss_axes="FCHW",
    ),
    "framepack": Family(
        suffixes=("fp",),
        fps=30.0,
        caching_script="fpack_cache_latents",
        training_script="fpack_train_network",
        trainers=("FramePackNetworkTrainer",),
        network="lora_framepack",
        sections=True,
    ),
    "hidream": Family(
        suffixes=("ho1",),
        bucket_step=32,
        caching_script="hidream_o1_cache_pixel",
        training_script="hidream_o1_train_network",
        trainers=("HiDreamO1NetworkTrainer",),
        whole_model=("hidream_o1_train", "HiDreamO1Trainer"),
        network="lora_hidream_o1",
        latent_axes="HWC",
        loss_axes="NC",
    ),
}

# Scripts of the trainer where no mask can reach the loss, and why.
REFUSED = {
    "flux_2_train_network_self_flow": "compares two noisy views of a picture in a loss of its own, which is not finished in "
    "the trainer: train flux2",
    "hv_train": "trains the whole model in a loop of its own, where no loss can be put in: train a LoRA with hv",
}


def named(word: str) -> str:
    """Returns the name of the family that a user means: its name, the short name of its caches, or the trainer's script.

    Raises:
        UserError: for anything else, and for scripts that are refused, with exit status 2.
    """
    name = word.rsplit("/", 1)[-1].removesuffix(".py")
    if name in REFUSED:
        raise UserError(f"{name} {REFUSED[name]}", 2)
    scripts = {script: key for key, one in FAMILIES.items() for script in (one.training_script, *one.whole_model[:1])}
    found = name if name in FAMILIES else family_of(name) or scripts.get(name)
    if found is None:
        near = difflib.get_close_matches(name, [*FAMILIES, *scripts], 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"{word!r} is no model family{hint}: give one of {', '.join(FAMILIES)}", 2)
    return found


def family_of(suffix: str) -> str | None:
    """Returns the name of the family whose caches end in this short name, or None."""
    return next((name for name, family in FAMILIES.items() if suffix in family.suffixes), None)
