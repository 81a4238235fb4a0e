"""One odd cache, name or mask is one line; the rest is done. What would have gone wrong in silence is said."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import masked_loss_triton.cache.inject as inject_module
from masked_loss_triton.cli import main
from masked_loss_triton.files.atomic import NO_FILE
from masked_loss_triton.generate.mask_files import write_frames, write_video
from tests.cache.support import Lab, disc, frames_of, video_lab, weights

SIZE = (160, 120)


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path)
    for stem in "abc":
        lab.picture(stem, mask=disc(SIZE))
        lab.add_cache(stem)
    return lab


@pytest.mark.parametrize("command", ["cache", "cache --remove", "check", "inspect"])
def test_an_odd_cache_costs_nothing_but_its_line(lab, command, capsys):
    assert lab.run("cache", "--masks", lab.masks) == 0
    capsys.readouterr()
    odd = lab.cache / "aa_0000x0000_wan.safetensors"
    shutil.copy(lab.cache / "a_0160x0120_wan.safetensors", odd)
    newline = lab.cache / "line\nbreak_0160x0120_wan.safetensors"
    odd.with_name("b_0160x0120_wan.safetensors").rename(newline)
    (lab.images / "b.png").rename(lab.images / "line\nbreak.png")
    (lab.images / "b.txt").rename(lab.images / "line\nbreak.txt")
    (lab.masks / "b.png").rename(lab.masks / "line\nbreak.png")
    name, *flags = command.split()
    flags += ["--output", lab.folder / "sheet"] if name == "inspect" else ["--workers", "1"]
    status = lab.run(name, "--masks", lab.masks, *flags)
    said = "".join(capsys.readouterr())
    if command == "cache":
        assert "3 up to date, 1 problems" in said
    elif command == "cache --remove":
        assert "4 masks removed" in said, "to take weights out nothing needs to be known of the picture"
    elif command == "check":
        assert "a picture of 0x0 pixels, as its name says: delete it" in said
        assert "line\nbreak" not in said
    else:
        assert "3 of 4 items, 1 problems" in said
    assert status == (0 if command == "cache --remove" else 1)
    assert "Traceback" not in said


def test_what_nobody_foresaw_is_one_line_too(lab, capsys, monkeypatch):
    compute = inject_module.compute_weights

    def fail(item, *rest):
        if item.stem == "a":
            raise MemoryError("no room\nfor this")
        return compute(item, *rest)

    monkeypatch.setattr(inject_module, "compute_weights", fail)
    assert lab.run("cache", "--masks", lab.masks, "--workers", "1") == 1
    captured = capsys.readouterr()
    assert "2 masks written, 1 problems" in captured.out
    assert captured.err.count("\n") == 1
    assert "a_0160x0120_wan.safetensors: MemoryError: no room for this (--debug shows where)" in captured.err
    with pytest.raises(MemoryError):
        lab.run("cache", "--masks", lab.masks, "--debug")


def test_files_that_a_mac_leaves_and_links_to_themselves_are_no_masks(tmp_path):
    lab = video_lab(tmp_path, frames_of(5))
    (lab.masks / "clip").mkdir()
    for t, frame in enumerate(frames_of(5)):
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t}.png")
        (lab.masks / "clip" / f"._{t}.png").write_bytes(b"\0\5\x16\7")
    (lab.masks / "._clip.png").write_bytes(b"\0\5\x16\7")
    (lab.masks / "loop").symlink_to("loop")
    (lab.images / "._clip.mp4").write_bytes(b"\0\5\x16\7")
    path = lab.add_cache("clip_00000-005", (128, 128), frames=2)
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert weights(path).mean() < 0.5
    assert lab.run("check", "--masks", lab.masks) == 0


def test_an_animation_is_no_still_of_a_clip(tmp_path, capsys):
    frames = [Image.fromarray(frame) for frame in frames_of(5)]
    lab = video_lab(tmp_path, frames_of(5))
    frames[0].save(lab.masks / "clip.gif", save_all=True, append_images=frames[1:])
    lab.add_cache("clip_00000-005", (128, 128), frames=2)
    assert lab.run("cache", "--masks", lab.masks) == 1
    assert "clip.gif is an animation of 5 frames: give a folder" in capsys.readouterr().err
    assert lab.run("check", "--masks", lab.masks) == 1
    assert "is an animation of 5 frames" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["clip", "clip.mkv"])
def test_a_mask_that_is_longer_than_its_clip_is_told_of_once(tmp_path, capsys, form):
    """Also a video whose container does not say how many frames it has, as those that generate makes."""
    lab = video_lab(tmp_path, frames_of(5))
    masks = [(frame, {}) for frame in frames_of(7)]
    if form == "clip":
        write_frames(lab.masks / form, masks, lambda path: None)
    else:
        write_video(lab.masks / form, masks, 16, lambda path: NO_FILE)
    lab.add_cache("clip_00000-005", (128, 128), frames=2)
    lab.add_cache("clip_00000-001", (128, 128), frames=1)
    assert lab.run("cache", "--masks", lab.masks) == 0
    captured = capsys.readouterr()
    assert captured.err.count(f"{form} has 7 frames, but") == 1
    assert lab.run("check", "--masks", lab.masks) == 1
    assert f"masks/{form}  has 7 frames, but" in capsys.readouterr().out
    assert "2 masks written" in captured.out


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
def test_the_alpha_of_a_webm_is_its_mask(tmp_path, codec):
    """FFmpeg's own decoders of VP8 and VP9 drop it: the clip had full weight."""
    av = pytest.importorskip("av")
    lab = Lab(tmp_path)
    lab.write_toml(kind="video")
    masks = frames_of(5)
    with av.open(str(lab.images / "clip.webm"), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt = 128, 128, "yuva420p"
        stream.options = {"auto-alt-ref": "0", "crf": "4", "b": "2M"}
        for mask in masks:
            rgba = np.dstack([np.full((128, 128, 3), 90, np.uint8), mask])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba")))
        container.mux(stream.encode())
    path = lab.add_cache("clip_00000-005", (128, 128), frames=2)
    assert lab.run("cache", "--alpha_mask") == 0
    from tests.cache.test_clips import clip_expected

    assert (weights(path) - clip_expected(masks, 0, 5, 2)).abs().max() < 0.03
    assert lab.run("check", "--alpha_mask") == 0


def test_a_window_without_end_ends(tmp_path, capsys):
    """The frames of a window are counted along the clip, and the clip ends."""
    lab = video_lab(tmp_path, frames_of(5))
    (lab.masks / "clip").mkdir()
    for t, frame in enumerate(frames_of(5)):
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t}.png")
    path = lab.add_cache("clip_00000-005", (128, 128), frames=2)
    endless = path.with_name("clip_00000-100000000001_0128x0128_wan.safetensors")
    path.rename(endless)
    assert lab.run("cache", "--masks", lab.masks) == 1
    assert "has only 5 frames of the 100000000001" in capsys.readouterr().err
    assert lab.run("check", "--masks", lab.masks) == 1
    lab.run("inspect", "--output", lab.folder / "sheet")


def test_latents_that_are_not_finite_are_shown(lab):
    path = lab.add_cache("a", extra={"mask_weights_1x14x18_float32": torch.ones(1, 1, 14, 18)})
    for value in (torch.inf, torch.nan, 3e38):
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        tensors["latents_1x14x18_bfloat16"][:, 0, :3, :4] = value
        save_file(tensors, path, metadata={"width": "160", "height": "120"})
        assert main(["inspect", "--cache", str(path), "--output", str(lab.folder / "sheet")]) == 0


def test_names_cannot_write_to_the_terminal(lab, capsys):
    (lab.masks / "\x1b[31mred\n\u202e.png").write_bytes(b"")
    (lab.masks / "a.png").rename(lab.masks / "\x1b[2J.png")
    (lab.images / "a.png").rename(lab.images / "\x1b[2J.png")
    (lab.images / "a.txt").rename(lab.images / "\x1b[2J.txt")
    (lab.cache / "a_0160x0120_wan.safetensors").rename(lab.cache / "\x1b[2J_0160x0120_wan.safetensors")
    (lab.masks / "\x1b[2J.png").write_bytes(b"")
    for command in (["cache"], ["check"], ["inspect", "--output", lab.folder / "sheet"]):
        assert lab.run(command[0], "--masks", lab.masks, *command[1:]) == 1
        said = "".join(capsys.readouterr())
        assert "\\x1b[2J" in said
        assert not {"\x1b", "\u202e"} & set(said)
    assert lab.run("check", "--masks", lab.masks, "--json") == 1
    assert json.loads(capsys.readouterr().out)
