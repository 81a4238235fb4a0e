"""Caches of the real trainer: its own dataset classes name the caches and cut the clips, its own functions save them, and its own
loader reads what the cache command wrote.

The latents are random: a VAE's weights are not needed to see where a mask lands.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from masked_loss_triton.cache.dataset import load_datasets
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.items import bucket_size
from masked_loss_triton.cli import main
from masked_loss_triton.masks.frames import kept_frames
from masked_loss_triton.masks.geometry import group_frames, resize_to_bucket, to_latent
from tests.cache.support import disc, weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def trainer(musubi):
    sys.path.insert(0, str(Path(musubi) / "src"))
    from musubi_tuner.dataset import bucket, cache_io, config_utils, image_video_dataset, media_utils

    yield argparse.Namespace(
        bucket=bucket, cache_io=cache_io, config=config_utils, dataset=image_video_dataset, media=media_utils
    )
    sys.path.remove(str(Path(musubi) / "src"))


def test_resize_is_the_trainers_bit_for_bit(trainer):
    rng = np.random.default_rng(3)
    for _ in range(300):
        height, width = rng.integers(1, 500, 2)
        bucket = tuple(int(side) * 16 for side in rng.integers(1, 24, 2))
        mask = rng.integers(0, 256, (height, width), dtype=np.uint8)
        theirs = trainer.media.resize_image_to_bucket(Image.fromarray(mask), bucket)
        assert np.array_equal(resize_to_bucket(mask, bucket), theirs)
        ours = resize_to_bucket(mask.astype(np.float32) / 255, bucket)
        assert np.abs(ours * 255 - theirs).max() <= 1


def test_buckets_are_the_trainers(trainer, tmp_path):
    rng = np.random.default_rng(4)
    for case in range(60):
        resolution = [int(side) for side in rng.integers(128, 1600, 2)]
        bucket, no_upscale = bool(rng.integers(2)), bool(rng.integers(2))
        toml = tmp_path / f"{case}.toml"
        toml.write_text(
            f"[[datasets]]\nresolution = {resolution}\nenable_bucket = {str(bucket).lower()}\n"
            f'bucket_no_upscale = {str(no_upscale).lower()}\nimage_directory = "{tmp_path}"\n'
        )
        (dataset,) = load_datasets(toml)
        selector = trainer.bucket.BucketSelector(tuple(resolution), bucket, no_upscale, "wan")
        for size in rng.integers(32, 4000, (20, 2)).tolist():
            theirs = tuple(int(side) for side in selector.get_bucket_resolution(tuple(size)))
            assert bucket_size(tuple(size), dataset, FAMILIES["wan"]) == theirs


def test_the_trainer_keeps_the_same_frames(trainer, tmp_path):
    for index in range(70):
        Image.new("RGB", (1, 1), (index, 0, 0)).save(tmp_path / f"{index:03d}.png")
    for source in (10.0, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 59.94, 60.0):
        for target in (16.0, 24.0):
            frames = trainer.media.load_video(str(tmp_path), source_fps=source, target_fps=target)
            theirs = [int(frame[0, 0, 0]) for frame in frames]
            assert list(kept_frames(70, source, target)) == theirs


SAVERS = {
    "hv": lambda io, item, latents: io.save_latent_cache(item, latents.half()),
    "wan": lambda io, item, latents: io.save_latent_cache_wan(item, latents.bfloat16(), None, None, None),
    "qi": lambda io, item, latents: io.save_latent_cache_qwen_image(item, latents.bfloat16(), None),
}


def trainer_datasets(trainer, toml, suffix):
    """The trainer's dataset objects for a dataset file."""
    generator = trainer.config.BlueprintGenerator(trainer.config.ConfigSanitizer())
    config = trainer.config.load_user_config(str(toml))
    blueprint = generator.generate(config, argparse.Namespace(debug_dataset=False), architecture=suffix)
    return trainer.config.generate_dataset_group_by_blueprint(blueprint.dataset_group).datasets


def cache_with_the_trainer(trainer, toml, suffix):
    """Lists, cuts and saves with the trainer's code; returns its datasets and its items by cache file."""
    datasets = trainer_datasets(trainer, toml, suffix)
    items = {}
    for dataset in datasets:
        for _, batch in dataset.retrieve_latent_cache_batches(1):
            for item in batch:
                content = item.content if item.content.ndim == 4 else item.content[None]
                frames = (len(content) - 1) // 4 + 1
                latents = torch.randn(16, frames, content.shape[1] // 8, content.shape[2] // 8)
                SAVERS[suffix](trainer.cache_io, item, latents)
                text = dataset.get_text_encoder_output_cache_path(item)
                stem = os.path.basename(text).removesuffix(f"_{suffix}_te.safetensors")
                if item.frame_count is not None:
                    stem = stem.rsplit("_", 1)[0]
                text = os.path.join(dataset.cache_directory, f"{stem}_{suffix}_te.safetensors")
                save_file({"varlen_t5_bfloat16": torch.zeros(3, 4)}, text)
                items[Path(item.latent_cache_path)] = (item, content)
    return datasets, items


def batches(dataset):
    dataset.prepare_for_training()
    manager = dataset.batch_manager
    return [manager[index] for index in range(len(manager))]


@pytest.mark.parametrize("suffix", ["hv", "wan", "qi"])
def test_the_trainer_reads_masks_of_pictures(trainer, tmp_path, suffix):
    images, masks, cache = (tmp_path / name for name in ("images", "masks", "cache"))
    images.mkdir()
    masks.mkdir()
    sizes = [(256, 256), (384, 256), (200, 320), (90, 70), (255, 257), (1000, 300)]
    for index, size in enumerate(sizes):
        mask = disc(size, (0.3 + 0.05 * index, 0.5))
        rgb = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        alpha = index % 2 == 1
        Image.fromarray(np.dstack([rgb, mask]) if alpha else rgb).save(images / f"p{index}.png")
        if not alpha:
            Image.fromarray(mask).save(masks / f"p{index}.png")
        (images / f"p{index}.txt").write_text("x")
    toml = tmp_path / "d.toml"
    toml.write_text(
        '[general]\ncaption_extension = ".txt"\nenable_bucket = true\nbatch_size = 2\n'
        f'[[datasets]]\nresolution = [256, 256]\nimage_directory = "{images}"\ncache_directory = "{cache}"\n'
    )
    datasets, items = cache_with_the_trainer(trainer, toml, suffix)
    assert len(items) == len(sizes)
    arch = {"hv": "hv", "wan": "wan", "qi": "qwen"}[suffix]
    flags = ["--dataset_config", str(toml), "--arch", arch, "--alpha_mask", "--masks", str(masks)]
    assert main(["cache", *flags]) == 0
    for path, (item, content) in items.items():
        index = int(Path(item.item_key).stem[1:])
        mask = Image.fromarray(disc(sizes[index], (0.3 + 0.05 * index, 0.5)))
        theirs = trainer.media.resize_image_to_bucket(mask, content.shape[1:3][::-1])
        plane = to_latent(np.ascontiguousarray(theirs), (content.shape[1] // 8, content.shape[2] // 8))
        assert torch.equal(weights(path)[0], torch.from_numpy(plane).half().float())
    (dataset,) = datasets
    seen = 0
    for batch in batches(dataset):
        latents = batch["latents"]
        shape = "x".join(map(str, latents.shape[2:]))
        mask = batch[f"mask_weights_{shape}"]
        assert mask.shape == (latents.shape[0], 1, *latents.shape[2:])
        assert mask.dtype == torch.float16
        seen += latents.shape[0]
    assert seen == len(sizes)


def write_clip(path, count, fps, size=(160, 128)):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for t in range(count):
            frame = np.repeat(disc(size, (0.2 + 0.6 * t / count, 0.5), 0.25)[..., None], 3, axis=2)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.mark.parametrize("suffix", ["hv", "wan"])
@pytest.mark.parametrize(
    "extraction",
    [
        'frame_extraction = "head"\ntarget_frames = [1, 9, 21]',
        'frame_extraction = "chunk"\ntarget_frames = [5, 9]\nsource_fps = 30.0',
        'frame_extraction = "slide"\ntarget_frames = [9]\nframe_stride = 3\nsource_fps = 25.0',
        'frame_extraction = "uniform"\ntarget_frames = [9]\nframe_sample = 3\nsource_fps = 23.976',
        'frame_extraction = "full"\nmax_frames = 21',
    ],
)
def test_the_mask_of_a_clip_gets_the_frames_that_the_trainer_gave_the_clip(trainer, tmp_path, suffix, extraction):
    """The clip shows its own mask, so what the trainer cut out of the clip is the mask that the weights must be made of."""
    videos, masks, cache = (tmp_path / name for name in ("videos", "masks", "cache"))
    videos.mkdir()
    masks.mkdir()
    for name, count in (("a", 37), ("b", 22)):
        write_clip(videos / f"{name}.mp4", count, 30)
        os.link(videos / f"{name}.mp4", masks / f"{name}.mp4")
        (videos / f"{name}.txt").write_text("x")
    toml = tmp_path / "d.toml"
    toml.write_text(
        '[general]\ncaption_extension = ".txt"\nbatch_size = 1\n'
        f'[[datasets]]\nresolution = [128, 96]\nvideo_directory = "{videos}"\ncache_directory = "{cache}"\n{extraction}\n'
    )
    datasets, items = cache_with_the_trainer(trainer, toml, suffix)
    assert items
    flags = ["--dataset_config", str(toml), "--arch", suffix, "--masks", str(masks), "--dtype", "float32"]
    assert main(["cache", *flags]) == 0
    for path, (_, content) in items.items():
        size = (content.shape[1] // 8, content.shape[2] // 8)
        luma = [np.asarray(Image.fromarray(frame).convert("L")) for frame in content]
        planes = np.stack([to_latent(np.ascontiguousarray(frame), size) for frame in luma])
        expected = group_frames(planes, (len(content) - 1) // 4 + 1)
        # The trainer resizes colours and we resize luma: rounding to 8 bits falls in another order.
        assert np.abs(weights(path).numpy() - expected).max() <= 1 / 255
        assert weights(path).max() > 0.9
    (dataset,) = datasets
    for batch in batches(dataset):
        assert any(key.startswith("mask_weights_") for key in batch)


def test_masks_are_added_while_the_trainer_saves(trainer, tmp_path):
    from masked_loss_triton.cache.encode import _wrap_saving

    saved = []
    undo = _wrap_saving(saved.append)
    try:
        item = trainer.dataset.ItemInfo(
            "a.png", "", (64, 64), (64, 64), latent_cache_path=str(tmp_path / "a_0064x0064_wan.safetensors")
        )
        SAVERS["wan"](trainer.cache_io, item, torch.randn(16, 1, 8, 8))
    finally:
        undo()
    assert saved == [tmp_path / "a_0064x0064_wan.safetensors"]
    assert saved[0].exists()
    SAVERS["wan"](trainer.cache_io, item, torch.randn(16, 1, 8, 8))
    assert len(saved) == 1


def test_the_trainer_accepts_the_dataset_file_without_our_keys(trainer, tmp_path):
    import json

    from masked_loss_triton.cache.dataset import without_mask_keys

    toml = tmp_path / "d.toml"
    toml.write_text(
        '[general]\ncaption_extension = ".txt"\nmask_dilate = 3\n[[datasets]]\nresolution = [64, 64]\n'
        f'image_directory = "{tmp_path}"\nalpha_mask = true\nmask_directory = "masks"\n'
    )
    generator = trainer.config.BlueprintGenerator(trainer.config.ConfigSanitizer())
    config = trainer.config.load_user_config(str(toml))
    arguments = argparse.Namespace(debug_dataset=False)
    with pytest.raises(Exception, match="extra keys not allowed"):
        generator.generate(config, arguments, architecture="wan")
    stripped = tmp_path / "d.json"
    stripped.write_text(json.dumps(without_mask_keys(toml)))
    generator.generate(trainer.config.load_user_config(str(stripped)), arguments, architecture="wan")


def test_layered_caches_of_the_trainer(trainer, tmp_path):
    images, cache = tmp_path / "images", tmp_path / "cache"
    images.mkdir()
    planes = [disc((160, 120), (x, 0.5)) for x in (0.3, 0.5, 0.7)]
    for name, alpha in zip(("a", "a_0", "a_1"), planes, strict=True):
        Image.fromarray(np.dstack([np.full((120, 160, 3), 80, np.uint8), alpha])).save(images / f"{name}.png")
    (images / "a.txt").write_text("x")
    toml = tmp_path / "d.toml"
    toml.write_text(
        '[general]\ncaption_extension = ".txt"\nenable_bucket = true\n[[datasets]]\nresolution = [128, 128]\n'
        f'multiple_target = true\nimage_directory = "{images}"\ncache_directory = "{cache}"\n'
    )
    (dataset,) = trainer_datasets(trainer, toml, "qil")
    (item,) = [item for _, batch in dataset.retrieve_latent_cache_batches(1) for item in batch]
    assert len(item.content) == 3
    height, width = item.content[0].shape[:2]
    SAVERS["qi"](trainer.cache_io, item, torch.randn(16, 3, height // 8, width // 8))
    assert main(["cache", "--dataset_config", str(toml), "--arch", "qwen", "--alpha_mask"]) == 0
    result = weights(Path(item.latent_cache_path))
    for plane, content in zip(result, item.content, strict=True):
        expected = to_latent(np.ascontiguousarray(content[..., 3]), (height // 8, width // 8))
        assert torch.equal(plane, torch.from_numpy(expected).half().float()), (
            "the alpha that the trainer itself encodes"
        )


def test_one_frame_caches_of_the_trainer(trainer, tmp_path):
    images, controls, masks, cache = (tmp_path / name for name in ("images", "controls", "masks", "cache"))
    for folder in (images, controls, masks):
        folder.mkdir()
    for folder in (images, controls):
        Image.new("RGB", (160, 120), (9, 99, 199)).save(folder / "a.png")
    Image.fromarray(disc((160, 120))).save(masks / "a.png")
    (images / "a.txt").write_text("x")
    toml = tmp_path / "d.toml"
    toml.write_text(
        '[general]\ncaption_extension = ".txt"\nenable_bucket = true\n[[datasets]]\nresolution = [128, 128]\n'
        f'image_directory = "{images}"\ncontrol_directory = "{controls}"\ncache_directory = "{cache}"\n'
        "fp_1f_clean_indices = [9]\nfp_1f_target_index = 1\n"
    )
    (dataset,) = trainer_datasets(trainer, toml, "wan")
    (item,) = [item for _, batch in dataset.retrieve_latent_cache_batches(1) for item in batch]
    height, width = item.content.shape[:2]
    indices = sorted([*item.fp_1f_clean_indices, item.fp_1f_target_index])
    latents = torch.randn(16, len(indices), height // 8, width // 8).bfloat16()
    trainer.cache_io.save_latent_cache_wan(item, latents, None, None, None, f_indices=indices)
    flags = ["--dataset_config", str(toml), "--arch", "wan", "--masks", str(masks)]
    assert main(["cache", *flags]) == 0
    result = weights(Path(item.latent_cache_path))
    theirs = trainer.media.resize_image_to_bucket(Image.fromarray(disc((160, 120))), (width, height))
    expected = to_latent(np.ascontiguousarray(theirs), (height // 8, width // 8))
    assert torch.equal(result[indices.index(1)], torch.from_numpy(expected).half().float())
    assert (result[indices.index(9)] == 1).all()
