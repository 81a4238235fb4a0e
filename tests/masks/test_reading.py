"""Masks and pictures of every kind people have come back with the right values; every broken file gives one line."""

from __future__ import annotations

import io
import os
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.errors import UserError
from masked_loss_triton.masks import reading
from masked_loss_triton.masks.reading import read_alpha, read_mask_file, read_picture, to_float


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture
def rgb(rng):
    return rng.integers(0, 256, (12, 17, 3), dtype=np.uint8)


@pytest.fixture
def alpha(rng):
    return rng.integers(0, 256, (12, 17), dtype=np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_rgba_keeps_colours_under_transparent_pixels(tmp_path, rgb, alpha):
    alpha[:, :8] = 0
    picture = read_picture(save(tmp_path / "a.png", np.dstack([rgb, alpha])))
    assert np.array_equal(picture.rgb, rgb)
    assert picture.alpha is not None
    assert picture.alpha.dtype == np.float32
    assert np.array_equal(picture.alpha, alpha.astype(np.float32) / np.float32(255))
    assert picture.path == tmp_path / "a.png"


def test_rgb_has_no_alpha(tmp_path, rgb):
    assert read_picture(save(tmp_path / "a.png", rgb)).alpha is None


def test_grey_with_alpha(tmp_path, rgb, alpha):
    Image.merge("LA", [Image.fromarray(rgb[..., 0]), Image.fromarray(alpha)]).save(tmp_path / "a.png")
    picture = read_picture(tmp_path / "a.png")
    assert np.array_equal(picture.rgb, np.repeat(rgb[..., :1], 3, axis=2))
    assert np.array_equal(np.rint(picture.alpha * 255), alpha)


@pytest.mark.parametrize("key", [3, bytes([255] * 3 + [0] + [128] * 252)])
def test_palette_with_transparency(tmp_path, rng, key):
    index = rng.integers(0, 6, (12, 17), dtype=np.uint8)
    image = Image.fromarray(index)
    image = image.convert("P")
    image.putpalette([*range(0, 180, 10)] + [0] * (768 - 18))
    image.putdata(index.reshape(-1).tolist())
    image.save(tmp_path / "a.png", transparency=key)
    picture = read_picture(tmp_path / "a.png")
    table = np.array([255, 255, 255, 0, 255, 255] if key == 3 else list(key[:6]))
    assert np.array_equal(np.rint(picture.alpha * 255), table[index])
    assert np.array_equal(picture.rgb[..., 0], index * 30)


def test_rgb_with_a_transparent_colour(tmp_path, rgb):
    rgb[2:5, 3:9] = (1, 2, 3)
    Image.fromarray(rgb).save(tmp_path / "a.png", transparency=(1, 2, 3))
    expected = np.ones((12, 17), np.float32)
    expected[2:5, 3:9] = 0
    assert np.array_equal(to_float(read_alpha(tmp_path / "a.png")), expected)


def test_16_bit_grey_mask_keeps_its_depth(tmp_path, rgb, rng):
    values = rng.integers(0, 65536, (12, 17), dtype=np.uint16)
    mask = save(tmp_path / "m.png", values)
    np.testing.assert_allclose(read_mask_file(mask), values / 65535, atol=1e-7)
    assert np.abs(read_picture(mask).rgb[..., 0] - values / 257).max() <= 0.5


@pytest.mark.parametrize("channels", [2, 4])
def test_16_bit_with_alpha(tmp_path, rng, channels):
    import cv2

    values = rng.integers(0, 65536, (12, 17, 4), dtype=np.uint16)
    # OpenCV cannot write grey with alpha: that file is built from its chunks.
    grey_alpha = png_16_bit_grey_alpha(values[..., [0, 3]])
    data = grey_alpha if channels == 2 else cv2.imencode(".png", values)[1].tobytes()
    (tmp_path / "a.png").write_bytes(data)
    picture = read_picture(tmp_path / "a.png")
    assert np.abs(picture.alpha - values[..., 3] / 65535).max() <= 1 / 255
    blue = values[..., 0].astype(float) / 257
    assert np.abs(picture.rgb[..., 2] - blue).max() <= 1


def png_16_bit_grey_alpha(values: np.ndarray) -> bytes:
    import struct

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_cmyk(tmp_path, rgb):
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "a.tif")
    assert np.array_equal(read_picture(tmp_path / "a.tif").rgb, rgb)


def test_animation_gives_its_first_frame(tmp_path, rgb):
    frames = [Image.fromarray(np.full((12, 17), v, np.uint8)) for v in (200, 100, 0)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert np.array_equal(read_picture(tmp_path / "a.gif").rgb, np.full((12, 17, 3), 200, np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, rgb, alpha, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.png", np.dstack([rgb, alpha]), exif=exif)
    turned = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: np.rot90(rgb, 2).transpose(1, 0, 2),
        8: np.rot90(rgb),
    }[orientation]
    assert np.array_equal(read_picture(path).rgb, turned)
    assert read_picture(path).alpha.shape == turned.shape[:2]
    assert np.array_equal(read_picture(path, exif=False).rgb, rgb)
    assert read_alpha(path).shape == turned.shape[:2]


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1", "RGBA", "LA"])
def test_a_black_and_white_mask_reads_the_same_however_it_was_saved(tmp_path, rgb, mode):
    expected = np.zeros((12, 17), np.float32)
    expected[3:9, 4:11] = 1
    Image.fromarray((expected * 255).astype(np.uint8)).convert(mode).save(tmp_path / "m.png")
    assert np.array_equal(to_float(read_mask_file(tmp_path / "m.png")), expected)


def test_transparent_parts_of_a_mask_file_count_as_black(tmp_path, rgb, alpha):
    white = np.dstack([np.full((12, 17, 3), 255, np.uint8), alpha])
    mask = to_float(read_mask_file(save(tmp_path / "m.png", white)))
    assert np.array_equal(np.rint(mask * 255), alpha)


def broken_files(folder, rgb):
    buffer = io.BytesIO()
    Image.fromarray(rgb).resize((400, 300)).save(buffer, "PNG")
    png = buffer.getvalue()
    (folder / "cut.png").write_bytes(png[: len(png) // 2])
    (folder / "header_only.png").write_bytes(png[:30])
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "zero.png").write_bytes(b"")
    (folder / "text.png").write_text("not a picture")
    (folder / "folder.png").mkdir()
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("nowhere.png", folder / "dangling.png")
    os.mkfifo(folder / "pipe.png")
    np.save(folder / "array.npy", rgb)
    (folder / "array.npy").rename(folder / "array.png")
    return sorted(folder.iterdir())


def test_every_broken_file_gives_one_line_that_names_it(tmp_path, rgb):
    folder = tmp_path / "broken"
    folder.mkdir()
    files = [*broken_files(folder, rgb), folder / "absent.png"]
    assert len(files) == 11
    for file in files:
        for read in (read_picture, read_mask_file, read_alpha):
            with pytest.raises(UserError) as caught:
                read(file)
            message = str(caught.value)
            assert str(file) in message
            assert "\n" not in message
            assert any(verb in message for verb in ("remove", "add", "save", "replace", "correct")), message


@pytest.mark.parametrize("value", [np.nan, 255, -0.5])
def test_float_masks_must_be_between_0_and_1(tmp_path, rgb, value):
    mask = save(tmp_path / "m.tif", np.full((4, 4), value, np.float32))
    with pytest.raises(UserError, match=r"m\.tif: values in mode F must be between 0 and 1"):
        read_mask_file(mask)
    half = save(tmp_path / "half.tif", np.full((4, 4), 0.5, np.float32))
    assert np.array_equal(read_mask_file(half), np.full((4, 4), 0.5, np.float32))


def test_extension_does_not_matter(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.jpg", "PNG")
    assert np.array_equal(read_picture(tmp_path / "a.jpg").rgb, rgb)


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_sizes(tmp_path, size):
    picture = read_picture(save(tmp_path / "a.png", np.full(size, 9, np.uint8)))
    assert picture.rgb.shape == (*size, 3)
    assert read_mask_file(tmp_path / "a.png").shape == size


def test_a_picture_starts_no_other_program(tmp_path, monkeypatch):
    """PostScript, whatever its file is called, would run Ghostscript."""
    from PIL import EpsImagePlugin

    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "x.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(UserError, match=r"x\.png is not a picture in a known format"):
        read_picture(tmp_path / "x.png")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(13000, 13000), (40000, 40000)])
def test_more_pixels_than_a_mask_can_need_are_refused_before_they_are_decoded(tmp_path, size):
    """Pillow itself refuses the second one."""
    Image.new("1", (8, 8)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(data)
    for read in (read_picture, read_mask_file):
        with pytest.raises(
            UserError, match=r"a\.png has .*pixels, more than the 134 million that are decoded: make it"
        ):
            read(tmp_path / "a.png")


def test_large_pictures_are_decoded_one_at_a_time(tmp_path, rgb, monkeypatch):
    path = save(tmp_path / "a.png", rgb)
    meeting = threading.Barrier(2)

    def meets(timeout):
        """Whether somebody else has a picture open at the same time."""
        with reading.open_image(path):
            try:
                meeting.wait(timeout)
            except threading.BrokenBarrierError:
                return False
            return True

    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(reading, "LARGE_PIXELS", rgb[..., 0].size)
        assert list(pool.map(meets, [60, 60])) == [True, True]
        monkeypatch.setattr(reading, "LARGE_PIXELS", rgb[..., 0].size - 1)
        assert list(pool.map(meets, [0.2, 0.2])) == [False, False]
