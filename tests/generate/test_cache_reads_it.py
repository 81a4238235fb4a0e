"""What generate writes feeds check, inspect and cache with no further step, for pictures and for clips."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from masked_loss_triton.cli import main
from masked_loss_triton.masks.frames import read_frames
from masked_loss_triton.masks.geometry import group_frames, resize_to_bucket, to_latent
from tests.cache.support import Lab, read, weights
from tests.generate.support import subject, write_clip


def generate(lab: Lab, *flags) -> int:
    paths = ["--images", str(lab.images), "--masks", str(lab.masks)]
    return main(["generate", *paths, "--backend", "grabcut", *flags])


def latent(mask: np.ndarray, bucket: tuple[int, int] = (128, 128), cell: int = 8) -> np.ndarray:
    return to_latent(resize_to_bucket(mask, bucket), (bucket[1] // cell, bucket[0] // cell))


def test_pictures(tmp_path, capsys):
    lab = Lab(tmp_path)
    for seed, extension in enumerate(("png", "jpg", "webp")):
        picture, _ = subject(seed, (128, 128))
        Image.fromarray(picture).save(lab.images / f"p{seed}.{extension}")
        (lab.images / f"p{seed}.txt").write_text("a caption")
    paths = [lab.add_cache(f"p{seed}", (128, 128)) for seed in range(3)]
    assert generate(lab) == 0
    flags = ("--masks", lab.masks, "--require_mask")
    assert lab.run("cache", *flags) == 0
    assert lab.run("check", *flags) == 0
    assert "0 problems" in capsys.readouterr().out
    assert lab.run("inspect", *flags, "--output", tmp_path / "sheet") == 0
    for seed, path in enumerate(paths):
        mask = np.array(Image.open(lab.masks / f"p{seed}.png"))
        assert torch.equal(weights(path)[0], torch.from_numpy(latent(mask)).half().float())
        assert read(path)[1]["mask_source"] == "file"
        truth = torch.from_numpy(latent(subject(seed, (128, 128))[1] * np.uint8(255)))
        assert (weights(path)[0] - truth).abs().mean() < 0.03


def test_a_picture_that_exif_turns(tmp_path):
    """Square, so that its shape does not tell; the trainer caches it as it is stored."""
    lab = Lab(tmp_path)
    upright, mask = subject(4, (128, 128))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(upright)).save(lab.images / "turned.png", exif=exif)
    (lab.images / "turned.txt").write_text("a caption")
    path = lab.add_cache("turned", (128, 128))
    assert generate(lab) == 0
    assert lab.run("cache", "--masks", lab.masks) == 0
    truth = torch.from_numpy(latent(np.rot90(mask) * np.uint8(255)))
    assert (weights(path)[0] - truth).abs().mean() < 0.03
    assert (weights(path)[0] - truth.T).abs().mean() > 0.05, "upright and turned are alike: the test has shown nothing"


@pytest.mark.parametrize("form", ["frames", "video"])
def test_clips(tmp_path, form, capsys):
    lab = Lab(tmp_path)
    lab.write_toml(kind="video")
    picture, mask = subject(1, (160, 128))
    write_clip(lab.images / "clip.mp4", [picture[:, 2 * t : 2 * t + 128] for t in range(13)])
    paths = {window: lab.add_cache(f"clip_{window[0]:05d}-{window[1]:03d}", (128, 128), frames=window[2])
             for window in ((0, 13, 4), (4, 9, 3))}  # fmt: skip
    assert generate(lab, "--clip_output", form, "--key_interval", "5") == 0
    flags = ("--masks", lab.masks, "--require_mask")
    assert lab.run("cache", *flags) == 0
    assert lab.run("check", *flags) == 0
    assert "0 problems" in capsys.readouterr().out
    written = list(read_frames(lab.masks / ("clip" if form == "frames" else "clip.mkv")))
    assert len(written) == 13
    assert set(np.unique(np.stack(written))) == {0, 255}, "a mask is never lossy"
    for (start, count, frames), path in paths.items():
        planes = np.stack([latent(one) for one in written[start : start + count]])
        assert torch.equal(weights(path), torch.from_numpy(group_frames(planes, frames, "mean")).half().float())
    truth = np.stack([latent(mask[:, 2 * t : 2 * t + 128] * np.uint8(255)) for t in range(13)])
    expected = torch.from_numpy(group_frames(truth, 4, "mean"))
    assert (weights(paths[0, 13, 4]) - expected).abs().mean() < 0.03
