"""masked-loss check names every kind of problem, once, with exit status 1, and none where there is none."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from masked_loss_triton.cache.dataset import load_datasets
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.inject import inject, prepare
from masked_loss_triton.cache.kinds import KINDS
from masked_loss_triton.files.atomic import temporary_name
from tests.cache.support import Lab, disc, frames_of, read, video_lab, weights
from tests.cache.test_clips import clip_expected


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)


def problems(lab, capsys, *flags):
    status = lab.run("check", "--masks", lab.masks, "--json", *flags)
    found = json.loads(capsys.readouterr().out)
    assert status == (1 if found else 0)
    return {(one["kind"], one["file"].rsplit("/", 1)[1]) for one in found}


def make_two(lab, capsys):
    """Pictures, masks and masked caches of a and b."""
    for stem in "ab":
        lab.picture(stem, mask=disc((160, 120)))
        lab.add_cache(stem)
    assert lab.run("cache", "--masks", lab.masks) == 0
    capsys.readouterr()


def test_a_sound_dataset_has_no_problems(lab, capsys):
    make_two(lab, capsys)
    assert problems(lab, capsys) == set()
    assert lab.run("check", "--masks", lab.masks) == 0
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
    lab.run("cache", "--masks", lab.masks)
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
        ("cut", "cropped.png"),
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
    assert lab.run("check", "--masks", lab.masks) == 1
    table = capsys.readouterr().out
    elsewhere = ("frames", "order", "unread", "options", "damaged")
    assert all(f"\n{kind} (" in table for kind in KINDS if kind not in elsewhere)
    assert "broken.png  is not a picture in a known format" in table


def test_a_mask_that_can_no_longer_be_read_is_unreadable_and_not_outdated(lab, capsys):
    """Caching again would not help."""
    make_two(lab, capsys)
    (lab.masks / "a.png").write_bytes((lab.masks / "a.png").read_bytes()[:80])
    Image.fromarray(disc((160, 120), radius=0.1)).save(lab.masks / "b.png")
    assert problems(lab, capsys) == {("unreadable", "a.png"), ("outdated", "b_0160x0120_wan.safetensors")}


def test_a_clip_mask_that_can_no_longer_be_read_is_unreadable_and_not_outdated(tmp_path, capsys):
    frames = frames_of(9)
    lab = video_lab(tmp_path, frames)
    (lab.masks / "clip").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t}.png")
    lab.add_cache("clip_00000-009", (128, 128), frames=3)
    assert lab.run("cache", "--masks", lab.masks) == 0
    capsys.readouterr()
    (lab.masks / "clip" / "0.png").write_bytes(b"x")
    assert {kind for kind, _ in problems(lab, capsys)} == {"unreadable"}


def test_frames_of_clips(tmp_path, capsys):
    frames = frames_of(9)
    lab = video_lab(tmp_path, frames)
    (lab.masks / "clip").mkdir()
    for t, frame in enumerate(frames[:8]):
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t}.png")
    assert problems(lab, capsys) == {("frames", "clip")}
    Image.fromarray(frames[8]).save(lab.masks / "clip" / "8.png")
    assert problems(lab, capsys) == set()
    Image.fromarray(frames[8]).save(lab.masks / "clip.png")  # in vain: the folder comes first
    assert problems(lab, capsys) == {("ambiguous", "clip.png")}
    (lab.masks / "clip.png").unlink()
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
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert [one.name for one in lab.cache.iterdir()] == [path.name], "the cache command clears them"


def test_it_says_how_caches_were_masked(lab, capsys):
    for stem in "ab":
        lab.picture(stem, mask=disc((160, 120)))
        lab.add_cache(stem)
    flags = ("--mask_dilate", "8", "--mask_blur", "0.005")
    assert lab.run("cache", "--masks", lab.masks, *flags) == 0
    capsys.readouterr()
    assert lab.run("check", "--masks", lab.masks) == 0, "nobody asks for other options"
    assert "Masked with: mask_dilate 8, mask_blur 0.005 (2)" in capsys.readouterr().out
    assert lab.run("check", "--masks", lab.masks, "--mask_dilate", "3") == 1
    said = capsys.readouterr().out
    assert said.count("masked with mask_dilate 8, mask_blur 0.005, now asked for mask_dilate 3: give the same") == 2
    assert "outdated" not in said
    Image.fromarray(disc((160, 120), radius=0.1)).save(lab.masks / "a.png")
    assert problems(lab, capsys, *flags) == {("outdated", "a_0160x0120_wan.safetensors")}
    assert lab.run("cache", "--masks", lab.masks) == 0
    lab.add_cache("b")
    inject_only(lab, "b", mask_dilate=2)
    capsys.readouterr()
    assert problems(lab, capsys) == {("options", "b_0160x0120_wan.safetensors")}, "they differ among themselves"


def inject_only(lab, stem, **operations):
    dataset = load_datasets(lab.toml, flags={"mask_directory": str(lab.masks), **operations})[0]
    prepared = prepare(dataset, FAMILIES[lab.arch])
    (outcome,) = inject(prepared, prepared.items_of(stem))
    assert outcome.status == "written"


def frame_of_another_size(lab):
    Image.new("L", (64, 96), 255).save(lab.masks / "clip" / "3.png")


def too_few_frames(lab):
    (lab.masks / "clip" / "4.png").unlink()


def a_missing_frame(lab):
    (lab.masks / "clip" / "2.png").unlink()


def a_window_that_is_no_window(lab):
    lab.add_cache("clip_00000-004", (128, 128), frames=3)


def a_broken_frame(lab):
    (lab.masks / "clip" / "2.png").write_bytes(b"")


@pytest.mark.parametrize(
    "spoil", [frame_of_another_size, too_few_frames, a_missing_frame, a_window_that_is_no_window, a_broken_frame]
)
def test_what_cache_refuses_of_a_clip_is_found(tmp_path, capsys, spoil):
    lab = video_lab(tmp_path, frames_of(5))
    (lab.masks / "clip").mkdir()
    for t, frame in enumerate(frames_of(5)):
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t}.png")
    lab.add_cache("clip_00000-005", (128, 128), frames=2)
    before = problems(lab, capsys)
    spoil(lab)
    found = problems(lab, capsys) - before
    assert lab.run("cache", "--masks", lab.masks) == 1
    assert found - {("unmasked", "clip_00000-004_0128x0128_wan.safetensors")}


def picture_of_another_size(lab):
    lab.picture("a", (80, 120), alpha=disc((80, 120)))


def a_broken_mask_of_an_orphan(lab):
    lab.add_cache("gone")
    (lab.masks / "gone.png").write_bytes(b"")


def a_mask_of_an_orphan_that_does_not_fit(lab):
    lab.add_cache("gone")
    Image.fromarray(disc((50, 80))).save(lab.masks / "gone.png")


def layers_without_pictures(lab):
    lab.add_cache("a", frames=3)


def a_second_name(lab):
    os.link(lab.cache / "a_0160x0120_wan.safetensors", lab.cache / "copy")


@pytest.mark.parametrize(
    "spoil",
    [
        picture_of_another_size,
        a_broken_mask_of_an_orphan,
        a_mask_of_an_orphan_that_does_not_fit,
        layers_without_pictures,
        a_second_name,
    ],
)
def test_what_cache_refuses_of_a_picture_is_found(lab, capsys, spoil):
    lab.picture("a", alpha=disc((160, 120)))
    lab.add_cache("a")
    flags = ("--alpha_mask", "--masks", lab.masks)
    assert problems(lab, capsys, "--alpha_mask") == {("unmasked", "a_0160x0120_wan.safetensors")}
    spoil(lab)
    found = problems(lab, capsys, "--alpha_mask", "--ignore", "orphan,unmasked")
    assert {kind for kind, _ in found} <= {"cache", "unreadable"}
    assert found
    assert lab.run("cache", *flags) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.5, 2.0])
def test_weights_that_are_none_are_found(lab, capsys, value):
    lab.picture("a", mask=disc((160, 120)))
    path = lab.add_cache("a")
    assert lab.run("cache", "--masks", lab.masks) == 0
    tensors, metadata = read(path)
    tensors["mask_weights_1x14x18_float16"][0, 0, 3, 3] = value
    save_file(tensors, path, metadata=metadata)
    capsys.readouterr()
    assert problems(lab, capsys) == {("cache", path.name)}
    lab.run("check", "--masks", lab.masks)
    assert capsys.readouterr().out.endswith("are not all between 0 and 1: run masked-loss cache again\n")
    assert lab.run("cache", "--masks", lab.masks) == 0
    capsys.readouterr()
    assert problems(lab, capsys) == set()


def test_formats_that_nobody_reads_are_told_of(lab, capsys):
    lab.picture("a", mask=disc((160, 120)))
    lab.add_cache("a")
    for name in ("b.HEIC", "c.tif", ".hidden.heic", "notes.md"):
        (lab.images / name).touch()
    (lab.masks / "d.exr").touch()
    assert problems(lab, capsys, "--ignore", "unmasked") == {
        ("unread", "b.HEIC"),
        ("unread", "c.tif"),
        ("unread", "d.exr"),
    }
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert "3 files of formats that are not read: b.HEIC, c.tif, d.exr" in capsys.readouterr().err


def test_a_clip_whose_frames_the_trainer_mixes_up(tmp_path, capsys):
    lab = Lab(tmp_path)
    folder = lab.folder / "clip"
    folder.mkdir()
    for t, frame in enumerate(frames_of(11)):
        Image.fromarray(frame).convert("RGB").save(folder / f"{t}.png")
        (lab.masks / "clip").mkdir(exist_ok=True)
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t}.png")
    (lab.folder / "clips.jsonl").write_text(json.dumps({"video_path": str(folder)}) + "\n")
    lab.toml.write_text(
        f'[[datasets]]\nresolution = [128, 128]\nvideo_jsonl_file = "{lab.folder}/clips.jsonl"\n'
        f'cache_directory = "{lab.cache}"\n'
    )
    assert problems(lab, capsys, "--arch", "wan") == {("order", "clip")}
    path = lab.add_cache("clip_00000-009", (128, 128), frames=3)
    assert lab.run("cache", "--masks", lab.masks) == 0
    texts = sorted(range(11), key=str)
    expected = clip_expected([frames_of(11)[t] for t in texts], 0, 9, 3)
    assert torch.equal(weights(path), expected), "the mask follows the clip as the trainer reads it"


@pytest.mark.parametrize("width", [128, 600, 1200])
def test_what_the_trainers_crop_cuts_off_a_clips_mask_is_told(tmp_path, capsys, width):
    """A disc that moves to the right. A bucket is at most four times as long as it is high: 600 pixels fit nearly, 1200 do not."""
    frames = frames_of(9, (width, 128))
    lab = video_lab(tmp_path, frames)
    (lab.masks / "clip").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t}.png")
    assert problems(lab, capsys) == ({("cut", "clip.mp4")} if width == 1200 else set())
