"""masked-loss check names every kind of problem, once, with exit status 1, and none where there is none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.cache.problems import KINDS
from masked_loss_triton.files.atomic import temporary_name
from tests.cache.support import Lab, disc, frames_of, video_lab


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def problems(lab, capsys, *flags):
    status = lab.run("check", "--mask_directory", lab.masks, "--json", *flags)
    found = json.loads(capsys.readouterr().out)
    assert status == (1 if found else 0)
    return {(one["kind"], one["file"].rsplit("/", 1)[1]) for one in found}


def test_a_sound_dataset_has_no_problems(lab, capsys):
    for stem in "ab":
        lab.picture(stem, mask=disc((160, 120)))
        lab.add_cache(stem)
    assert lab.run("cache", "--mask_directory", lab.masks) == 0
    capsys.readouterr()
    assert problems(lab, capsys) == set()
    assert lab.run("check", "--mask_directory", lab.masks) == 0
    assert "2 pictures and clips, 2 latent caches, 0 problems" in capsys.readouterr().out


def test_every_kind_of_a_picture_dataset(lab, capsys):
    size = (160, 120)
    for stem in ("good", "changed", "unmasked", "uncached", "cut", "twice"):
        lab.picture(stem, mask=disc(size))
    lab.picture("missing")
    lab.picture("empty", mask=np.zeros((120, 160), np.uint8))
    lab.picture("full", mask=np.full((120, 160), 254, np.uint8))
    lab.picture("half", mask=disc((80, 60)))
    lab.picture("square", mask=disc((120, 120)))
    lab.picture("broken", mask=disc(size)).write_bytes(b"no picture")
    exif = Image.Exif()
    exif[0x0112] = 6
    lab.picture("turned", mask=disc(size))
    Image.new("RGB", size).save(lab.images / "turned.png", exif=exif)
    edge = np.zeros((120, 160), np.uint8)
    edge[:, 0] = 255
    lab.picture("cropped", mask=edge)
    Image.fromarray(disc(size)).save(lab.masks / "nobody.png")
    Image.fromarray(disc(size)).save(lab.masks / "twice.bmp")
    for stem in (
        "good",
        "changed",
        "missing",
        "empty",
        "full",
        "half",
        "square",
        "broken",
        "turned",
        "cropped",
        "twice",
    ):
        lab.add_cache(stem)
    cut = lab.add_cache("cut")
    lab.add_cache("orphan")
    lab.run("cache", "--mask_directory", lab.masks)
    lab.add_cache("unmasked")
    cut.write_bytes(cut.read_bytes()[:-1])
    Image.fromarray(disc(size, radius=0.1)).save(lab.masks / "changed.png")
    capsys.readouterr()
    assert problems(lab, capsys) == {
        ("unreadable", "broken.png"),
        ("missing", "missing.png"),
        ("empty", "empty.png"),
        ("empty", "empty_0160x0120_wan.safetensors"),
        ("empty", "cropped_0160x0120_wan.safetensors"),
        ("full", "full.png"),
        ("size", "half.png"),
        ("aspect", "square.png"),
        ("rotated", "turned.png"),
        ("unused", "nobody.png"),
        ("ambiguous", "twice.bmp"),
        ("uncached", "uncached.png"),
        ("cache", "cut_0160x0120_wan.safetensors"),
        ("orphan", "orphan_0160x0120_wan.safetensors"),
        ("unmasked", "square_0160x0120_wan.safetensors"),
        ("unmasked", "unmasked_0160x0120_wan.safetensors"),
        ("outdated", "changed_0160x0120_wan.safetensors"),
        ("mixed", "cache"),
    }
    assert lab.run("check", "--mask_directory", lab.masks) == 1
    table = capsys.readouterr().out
    assert all(f"\n{kind} (" in table for kind in KINDS if kind not in ("frames", "damaged"))
    assert "broken.png  is not a picture in a known format" in table


def test_frames_of_clips(tmp_path, capsys):
    frames = frames_of(9)
    lab = video_lab(tmp_path, frames)
    (lab.masks / "clip").mkdir()
    for t, frame in enumerate(frames[:8]):
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t}.png")
    assert problems(lab, capsys) == {("frames", "clip")}
    Image.fromarray(frames[8]).save(lab.masks / "clip" / "8.png")
    assert problems(lab, capsys) == set()
    for path in (lab.masks / "clip").iterdir():
        Image.new("L", (128, 128)).save(path)
    assert problems(lab, capsys) == {("empty", "clip")}
    (lab.images / "clip.mp4").write_bytes(b"no video")
    assert problems(lab, capsys) == {("unreadable", "clip.mp4")}


def test_kinds_can_be_left_out(lab, capsys):
    lab.picture("missing")
    assert problems(lab, capsys) == {("missing", "missing.png")}
    assert problems(lab, capsys, "--ignore", "missing,size") == set()
    assert lab.run("check", "--ignore", "msising") == 2
    assert "no kind 'msising'" in capsys.readouterr().err


def test_nothing_is_changed(lab, capsys):
    lab.picture("a", mask=disc((160, 120)))
    path = lab.add_cache("a")
    temporary_name(lab.cache / "left.safetensors").write_bytes(b"of a killed run")
    before = {one: (one.stat().st_mtime_ns, one.read_bytes()) for one in lab.folder.rglob("*") if one.is_file()}
    problems(lab, capsys)
    assert {one: (one.stat().st_mtime_ns, one.read_bytes()) for one in lab.folder.rglob("*") if one.is_file()} == before
    assert path in before
    assert lab.run("cache", "--mask_directory", lab.masks) == 0
    assert [one.name for one in lab.cache.iterdir()] == [path.name], "the cache command clears them"
