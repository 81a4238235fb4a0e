"""Masks that move with the subject: stills, folders of frames and videos, through the trainer's selection of frames."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from masked_loss_triton.masks.geometry import group_frames, resize_to_bucket, to_latent
from tests.cache.support import Lab, frames_of, read, video_lab, weights


def clip_expected(frames, start, count, latents, reduce="mean"):
    planes = np.stack([to_latent(resize_to_bucket(one, (128, 128)), (16, 16)) for one in frames[start : start + count]])
    return torch.from_numpy(group_frames(planes, latents, reduce)).half().float()


@pytest.mark.parametrize("form", ["folder", "video", "still"])
def test_masks_of_clips_follow_every_window(tmp_path, form):
    frames = frames_of(13)
    lab = video_lab(tmp_path, frames)
    if form == "folder":
        (lab.masks / "clip").mkdir()
        for t, frame in enumerate(frames):
            Image.fromarray(frame).save(lab.masks / "clip" / f"{t}.png")
    elif form == "video":
        os.link(lab.images / "clip.mp4", lab.masks / "clip.mkv")
    else:
        Image.fromarray(frames[5]).save(lab.masks / "clip.png")
        frames = [frames[5]] * 13
    windows = [(0, 1, 1), (0, 13, 4), (4, 9, 3), (8, 5, 2)]
    paths = [lab.add_cache(f"clip_{s:05d}-{n:03d}", (128, 128), frames=f) for s, n, f in windows]
    assert lab.run("cache", "--masks", lab.masks) == 0
    tolerance = 0.02 if form == "video" else 0
    for path, window in zip(paths, windows, strict=True):
        difference = (weights(path) - clip_expected(frames, *window)).abs().max()
        assert difference <= tolerance
    if form == "folder":
        assert lab.run("cache", "--masks", lab.masks, "--mask_time", "max") == 0
        assert torch.equal(weights(paths[1]), clip_expected(frames, 0, 13, 4, "max"))
        assert (weights(paths[1]) >= clip_expected(frames, 0, 13, 4)).all()


def test_masks_lose_the_frames_that_the_clip_loses(tmp_path):
    from masked_loss_triton.masks.frames import kept_frames

    frames = frames_of(20)
    lab = video_lab(tmp_path, frames, fps=30, source_fps=30.0)
    (lab.masks / "clip").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t:04d}.png")
    path = lab.add_cache("clip_00001-009", (128, 128), frames=3)
    assert lab.run("cache", "--masks", lab.masks) == 0
    kept = [frames[i] for i in kept_frames(20, 30.0, 16.0)]
    assert len(kept) < 12
    assert torch.equal(weights(path), clip_expected(kept, 1, 9, 3))
    assert not torch.equal(weights(path), clip_expected(frames, 1, 9, 3))


def test_a_mask_with_too_few_frames_is_refused_once(tmp_path, capsys):
    frames = frames_of(9)
    lab = video_lab(tmp_path, frames)
    (lab.masks / "clip").mkdir()
    for t, frame in enumerate(frames[:4]):
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t:04d}.png")
    for n, f in ((5, 2), (9, 3)):
        lab.add_cache(f"clip_00000-{n:03d}", (128, 128), frames=f)
    assert lab.run("cache", "--masks", lab.masks) == 1
    captured = capsys.readouterr()
    assert captured.err.count("has only 4 frames of the 9") == 1
    assert "2 problems" in captured.out


def test_a_clip_with_alpha_is_its_own_mask(tmp_path):
    lab = Lab(tmp_path)
    frames = frames_of(5)
    folder = lab.folder / "clip"
    folder.mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(np.dstack([frame, frame, frame, frame])).save(folder / f"{t}.png")
    listing = lab.folder / "clips.jsonl"
    listing.write_text(json.dumps({"video_path": str(folder), "caption": "x"}) + "\n")
    lab.toml.write_text(
        f'[[datasets]]\nresolution = [128, 128]\nvideo_jsonl_file = "{listing}"\ncache_directory = "{lab.cache}"\n'
    )
    path = lab.add_cache("clip_00000-005", (128, 128), frames=2)
    assert lab.run("cache", "--alpha_mask") == 0
    assert read(path)[1]["mask_source"] == "alpha"
    assert torch.equal(weights(path), clip_expected(frames, 0, 5, 2))
