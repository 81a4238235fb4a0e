"""Five hundred odd files as pictures and as masks: no traceback, each bad one named once, the rest done."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.cache.support import Lab, disc

SIZE = (160, 120)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def odd_masks(rng):
    """(file extension, contents or None for something else, whether it can be used) without end."""
    base = disc(SIZE)
    grey = Image.fromarray(base)
    png = encoded(grey, "PNG")
    frames = [Image.fromarray(np.roll(base, 9 * t, axis=1)) for t in range(3)]
    while True:
        cut = int(rng.integers(1, len(png) - 12))
        yield "png", png[:cut], False
        yield "jpg", png, True  # wrong extension
        yield "png", encoded(grey.convert("RGB"), "JPEG"), True
        yield "png", encoded(Image.new("L", (1, 1), 255), "PNG"), False  # aspect
        yield "png", encoded(Image.new("L", (20000, 1), 255), "PNG"), False
        yield "png", encoded(Image.new("L", (1, 20000), 255), "PNG"), False
        yield "tif", encoded(grey.convert("CMYK"), "TIFF"), True
        yield "jpg", encoded(grey.convert("CMYK"), "JPEG"), True
        yield "gif", encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), True
        yield "webp", encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), True
        yield "png", encoded(Image.fromarray(base.astype(np.uint16) * 257), "PNG"), True
        yield "tif", encoded(Image.fromarray(base.astype(np.float32) / 255), "TIFF"), True
        yield "tif", encoded(Image.fromarray(base.astype(np.float32)), "TIFF"), False  # 0 to 255 in float
        yield "png", encoded(grey.convert("1"), "PNG"), True
        yield "png", encoded(grey.convert("P"), "PNG"), True
        yield "png", encoded(grey.convert("LA"), "PNG"), True
        yield "png", encoded(Image.merge("RGBA", [grey] * 4), "PNG"), True
        yield "png", b"", False  # zero bytes
        yield "png", rng.bytes(int(rng.integers(1, 400))), False
        yield "bmp", encoded(grey, "BMP"), True
        yield "bmp", encoded(grey, "BMP")[: int(rng.integers(20, 2000))], False
        yield "loop", None, False
        yield "folder", None, False
        yield "pipe", None, False
        yield "dangling", None, False


def write(path, kind, contents):
    if contents is not None:
        path.write_bytes(contents)
    elif kind == "loop":
        os.symlink(path.name, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        os.symlink("nowhere", path)


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """250 sound pictures with odd masks, 250 odd pictures with sound masks, a cache for each."""
    lab = Lab(tmp_path_factory.mktemp("odd"))
    source = odd_masks(np.random.default_rng(5))
    good = encoded(Image.fromarray(disc(SIZE)), "PNG")
    picture = encoded(Image.new("RGB", SIZE, (9, 99, 199)), "PNG")
    bad_masks, bad_pictures = set(), set()
    for index in range(500):
        kind, contents, usable = next(source)
        extension = kind if contents is not None else "png"
        odd_picture = index >= 250
        if odd_picture and extension in ("tif", "gif"):
            extension = "png"  # the trainer does not list the others
        stem = f"item{index:03d}"
        image = lab.images / f"{stem}.{extension if odd_picture else 'png'}"
        mask = lab.masks / f"{stem}.{'png' if odd_picture else extension}"
        write(image if odd_picture else mask, kind, contents)
        (mask if odd_picture else image).write_bytes(good if odd_picture else picture)
        image.with_suffix(".txt").write_text(stem)
        lab.add_cache(stem, SIZE)
        if not usable and not (odd_picture and kind == "tif"):  # a float picture is odd only as a mask
            (bad_pictures if odd_picture else bad_masks).add(str(image if odd_picture else mask))
    return lab, bad_masks, bad_pictures


@pytest.mark.slow
def test_check_names_each_bad_file_once(odd, capsys):
    lab, bad_masks, bad_pictures = odd
    assert lab.run("check", "--masks", lab.masks, "--json") == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    problems = [one for one in json.loads(captured.out) if one["kind"] not in ("unmasked", "full", "size")]
    named = [one["file"] for one in problems if one["file"] in bad_masks | bad_pictures]
    assert sorted(named) == sorted(set(named))
    assert bad_masks <= set(named)
    # A picture of another size is no broken picture: its mask is the one that does not fit.
    sizes = {path for path in bad_pictures if path not in named}
    for path in sizes:
        stem = os.path.splitext(os.path.basename(path))[0]
        assert sorted(one["kind"] for one in problems if stem in one["file"]) == ["aspect", "cache"]
    assert [one for one in problems if one["kind"] not in ("unreadable", "aspect", "cache")] == []
    assert all("\n" not in one["message"] for one in problems)


@pytest.mark.slow
def test_cache_names_each_bad_mask_once_and_does_the_rest(odd, capsys):
    lab, bad_masks, _ = odd
    assert lab.run("cache", "--masks", lab.masks) == 1
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert "Traceback" not in captured.err
    assert len(lines) == len(bad_masks)
    assert all(sum(path in line for line in lines) == 1 for path in bad_masks)
    done = [path for path in lab.cache.iterdir() if any("mask" in name for name in load_file(path))]
    assert len(done) == 500 - len(bad_masks)
    for path in done:
        (mask,) = (tensor for name, tensor in load_file(path).items() if "mask" in name)
        assert torch.isfinite(mask).all()
        assert 0 < mask.float().mean() < 1


@pytest.mark.slow
def test_alpha_of_odd_pictures(odd, capsys):
    lab, _, bad_pictures = odd
    assert lab.run("cache", "--alpha_mask", "--force") == 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = captured.err.splitlines()
    assert len({line for line in lines}) == len(lines)
    named = {path for path in bad_pictures if any(path in line for line in lines)}
    assert len(named) == len(lines)
    assert len(named) >= 40, (
        "of a picture without alpha only the header is read, so one that is cut later is not noticed"
    )
