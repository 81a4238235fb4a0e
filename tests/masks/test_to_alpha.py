"""Pictures and masks become RGBA pictures and come back, byte for byte."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.cli import main
from masked_loss_triton.files.locks import machine
from masked_loss_triton.masks import to_alpha
from masked_loss_triton.masks.reading import read_picture


@pytest.fixture
def folders(tmp_path):
    images, masks, out = (tmp_path / name for name in ("images", "masks", "out"))
    images.mkdir()
    masks.mkdir()
    return images, masks, out


def run(images, masks, out, *flags):
    return main(["to-alpha", "--images", str(images), "--masks", str(masks), "--output", str(out), *flags])


def make(path, seed, size=(40, 30), channels=3, **options):
    array = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels)[: 2 + (channels > 1)], np.uint8)
    Image.fromarray(array).save(path, **options)
    return array


def test_there_and_back(folders, tmp_path):
    images, masks, out = folders
    rgb = {stem: make(images / f"{stem}.png", i) for i, stem in enumerate("ab")}
    exif = Image.Exif()
    exif[0x0112] = 6
    make(images / "c.jpg", 7, exif=exif, icc_profile=b"profile", quality=95)
    rgb["c"] = read_picture(images / "c.jpg", exif=False).rgb
    mask = {stem: make(masks / f"{stem}.png", 10 + i, channels=1) for i, stem in enumerate("abc")}
    for stem in "abc":
        (images / f"{stem}.txt").write_text(f"caption {stem}")
    assert run(images, masks, out, "--captions", ".txt") == 0
    assert sorted(os.listdir(out)) == ["a.png", "a.txt", "b.png", "b.txt", "c.png", "c.txt"]
    for stem in "abc":
        with Image.open(out / f"{stem}.png") as image:
            assert np.array_equal(np.asarray(image), np.dstack([rgb[stem], mask[stem]]))
        assert (out / f"{stem}.txt").read_text() == f"caption {stem}"
    with Image.open(out / "c.png") as image:
        assert image.getexif()[0x0112] == 6
        assert image.info["icc_profile"] == b"profile"
    back, back_masks = tmp_path / "back", tmp_path / "back_masks"
    assert run(out, back_masks, back, "--split", "--captions", ".txt") == 0
    for stem in "abc":
        with Image.open(back / f"{stem}.png") as image, Image.open(back_masks / f"{stem}.png") as alpha:
            assert np.array_equal(np.asarray(image), rgb[stem])
            assert np.array_equal(np.asarray(alpha), mask[stem])


def test_labels_become_one_alpha_channel(folders, capsys):
    images, masks, out = folders
    make(images / "a.png", 0)
    face, body = np.zeros((30, 40), np.uint8), np.zeros((30, 40), np.uint8)
    face[5:15, 5:15], body[5:25, 5:30] = 255, 255
    Image.fromarray(face).save(masks / "a.face.png")
    Image.fromarray(body).save(masks / "a.body.png")
    weights = ["--mask_weights", "face=2", "body=0.5"]
    assert run(images, masks, out, *weights) == 0
    expected = np.where(face, 255, np.where(body, 64, 0))
    with Image.open(out / "a.png") as picture:
        assert np.array_equal(np.array(picture)[..., 3], expected)
    capsys.readouterr()
    assert run(images, masks, out, *weights) == 0
    assert "1 already there" in capsys.readouterr().out
    assert run(images, masks, out, "--mask_weights", "face=2", "body=1") == 1  # another picture is there
    assert run(images, masks, out, "--mask_weights", "fce=2") == 2
    assert "no mask of a label 'fce'" in capsys.readouterr().err
    assert run(images, masks, out, "--split", *weights) == 2


def test_nothing_is_overwritten_unasked(folders, capsys):
    images, masks, out = folders
    make(images / "a.png", 0)
    make(masks / "a.png", 1, channels=1)
    out.mkdir()
    (out / "a.png").write_text("precious")
    assert run(images, masks, out) == 1
    assert "is already there: give --force" in capsys.readouterr().err
    assert (out / "a.png").read_text() == "precious"
    assert run(images, masks, out, "--force") == 0
    assert read_picture(out / "a.png").alpha is not None


def test_what_comes_meanwhile_stays_and_leftovers_go(folders, monkeypatch, capsys):
    images, masks, out = folders
    make(images / "a.png", 0)
    make(masks / "a.png", 1, channels=1)
    out.mkdir()
    leftover = out / f".a.png.{machine()}.0123456789abcdef.masktmp"
    leftover.write_bytes(b"half")
    real = to_alpha.align_to_picture

    def slow(*arguments):
        (out / "a.png").write_text("precious")
        return real(*arguments)

    monkeypatch.setattr(to_alpha, "align_to_picture", slow)
    assert run(images, masks, out) == 1
    assert "a.png was written by another program meanwhile" in capsys.readouterr().err
    assert os.listdir(out) == ["a.png"]
    assert (out / "a.png").read_text() == "precious"


def test_each_problem_is_named_and_the_rest_done(folders, capsys):
    images, masks, out = folders
    for stem in ("good", "alone", "square", "nocaption"):
        make(images / f"{stem}.png", 3)
    make(images / "good.webp", 4)
    (images / "broken.png").write_bytes(b"x")
    for stem in ("good", "broken", "nocaption"):
        make(masks / f"{stem}.png", 5, channels=1)
    make(masks / "square.png", 5, size=(40, 40), channels=1)
    for stem in ("good", "alone", "square", "broken"):
        (images / f"{stem}.txt").write_text("x")
    assert run(images, masks, out, "--captions", ".txt") == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 5
    for part in ("alone.png has no mask", "broken.png is not a picture", "square.png is 40x40 but", "has no caption"):
        assert sum(part in line for line in lines) == 1
    assert "good.webp has the same stem as good.png" in captured.err
    assert sorted(os.listdir(out)) == ["good.png", "good.txt"]
    # The caption comes, and what was done stays as it is.
    (images / "nocaption.txt").write_text("x")
    assert run(images, masks, out, "--captions", ".txt") == 1
    assert "1 pictures written" in (said := capsys.readouterr().out)
    assert "1 already there, 4 problems" in said
    assert sorted(os.listdir(out)) == ["good.png", "good.txt", "nocaption.png", "nocaption.txt"]
    assert not any(name.endswith("masktmp") for name in os.listdir(out))


def test_usage(folders, capsys):
    images, masks, out = folders
    assert run(images, masks, out) == 2
    assert "has no pictures" in capsys.readouterr().err
    make(images / "a.png", 0)
    for bad in ("../../x", ".", "a/b"):
        assert run(images, masks, out, "--captions", bad) == 2
        assert f"--captions {bad!r} is not an extension" in capsys.readouterr().err
    (masks / "file").write_text("x")
    assert run(images, masks, masks / "file" / "out") == 2
    assert "file/out cannot be written (Not a directory)" in capsys.readouterr().err
    assert run(images, images, out) == 2
    assert "must be three folders" in capsys.readouterr().err
    assert run(images / "no", masks, out) == 2


def test_sub_folders_are_mirrored_and_done_once(folders, tmp_path, capsys):
    images, masks, out = folders
    for folder in (images / "a b" / "c", masks / "a b" / "c"):
        folder.mkdir(parents=True)
    for stem in ("x", "a b/c/x", "a b/c/y"):
        make(images / f"{stem}.png", 0)
        make(masks / f"{stem}.png", 1, channels=1)
    (images / "z.HEIC").write_bytes(b"x")
    assert run(images, masks, out) == 0
    assert "Skipped: 1 .heic: not read here" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert sorted(str(path.relative_to(out)) for path in before) == ["a b/c/x.png", "a b/c/y.png", "x.png"]
    assert run(images, masks, out) == 0
    assert "0 pictures written" in (said := capsys.readouterr().out)
    assert "3 already there, 0 problems" in said
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before
    # Another mask: what is there was not made of it.
    make(masks / "x.png", 2, channels=1)
    assert run(images, masks, out) == 1
    assert "x.png is already there: give --force" in capsys.readouterr().err
    assert run(images, masks, out, "--force") == 0
    back, back_masks = tmp_path / "back", tmp_path / "back_masks"
    for expected in ("3 pictures written", "3 already there"):
        assert run(out, back_masks, back, "--split") == 0
        assert expected in capsys.readouterr().out
    assert (back_masks / "a b" / "c" / "y.png").is_file()


@pytest.mark.parametrize(
    ("name", "channels"), [("a.png", 0), ("a.png", 3), ("a.png", 4), ("a.tif", 0), ("a.tif", 3), ("a.tif", 4)]
)
def test_16_bits_are_not_halved_unasked(folders, capsys, name, channels):
    import cv2

    images, masks, out = folders
    shape = (30, 40, channels) if channels else (30, 40)
    cv2.imwrite(str(images / name), np.random.default_rng(0).integers(0, 65536, shape, np.uint16))
    make(masks / "a.png", 1, channels=1)
    assert run(images, masks, out) == 1
    assert f"{name} has 16 bits per channel and would lose half of them" in capsys.readouterr().err
    assert not os.listdir(out)
