"""masked-loss inspect draws what training will weight, from files, from caches, and from both."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.cache import cards
from masked_loss_triton.cli import main
from masked_loss_triton.files.contact_sheet import overlay
from tests.cache.support import Lab, disc, frames_of, video_lab


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path)
    for stem in ("one", "two"):
        lab.picture(stem, mask=disc((160, 120)))
    lab.add_cache("one")
    return lab


def facts(html) -> list[str]:
    return re.findall(r'alt="([^"]*)"', html.read_text())


def test_from_files_with_and_without_a_cache(lab, capsys):
    out = lab.folder / "sheets" / "sheet"
    flags = ("--masks", lab.masks, "--mask_min_weight", "0.25", "--output", out)
    assert lab.run("inspect", *flags) == 0
    first = facts(out.with_suffix(".html"))
    assert any(
        "one: 160x120, bucket 144x112, latents 1x14x18" in one and "not in the cache yet" in one for one in first
    )
    assert any("two" in one and "not cached yet" in one for one in first)
    assert all("(0.25 to 1.00)" in one for one in first)
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert lab.run("inspect", *flags) == 0
    second = facts(out.with_suffix(".html"))
    assert any("weights in the cache, from file one.png" in one for one in second)
    # The same coverage from the file and from the cache.
    assert re.findall(r"coverage [\d.]+%", first[0]) == re.findall(r"coverage [\d.]+%", second[0])
    html = out.with_suffix(".html").read_text()
    assert "http" not in html, "self-contained"
    assert html.count("data:image/png;base64,") == 2
    with Image.open(out.with_suffix(".png")) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[1] > 900
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_from_a_cache_alone(lab, capsys):
    path = lab.cache / "one_0160x0120_wan.safetensors"
    out = lab.folder / "sheet"
    assert main(["inspect", "--cache", str(path), "--output", str(out)]) == 1
    assert "has no mask weights: run masked-loss cache" in capsys.readouterr().err
    assert lab.run("cache", "--masks", lab.masks) == 0
    lab.images.rename(lab.folder / "elsewhere")
    for given in (path, lab.cache):
        assert main(["inspect", "--cache", str(given), "--output", str(out), "--invert_mask"]) == 0
        (only,) = facts(out.with_suffix(".html"))
        assert "160x120, latents 1x14x18" in only
        assert "weights in the cache, from file one.png" in only
    share = float(re.search(r"coverage ([\d.]+)%", only).group(1)) / 100
    weight = float(re.search(r"mean weight ([\d.]+)", only).group(1))
    assert share + weight == pytest.approx(1, abs=0.002), "inverted at training time"


def test_a_strip_over_time(tmp_path):
    frames = frames_of(13)
    lab = video_lab(tmp_path, frames)
    (lab.masks / "clip").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(lab.masks / "clip" / f"{t:02d}.png")
    out = tmp_path / "sheet"

    def height() -> int:
        assert lab.run("inspect", "--masks", lab.masks, "--output", out) == 0
        with Image.open(out.with_suffix(".png")) as sheet:
            return sheet.height

    without_cache = height()
    path = lab.add_cache("clip_00000-001", (128, 128), frames=1)
    still = height()
    path.unlink()
    lab.add_cache("clip_00000-013", (128, 128), frames=4)
    assert height() == without_cache
    assert without_cache > still + 100, "the strip"
    assert "frames 0 to 12" in facts(out.with_suffix(".html"))[0]


def test_the_overlay_keeps_the_picture_where_the_weight_is_one():
    picture = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    weights = np.zeros((2, 3), np.float32)
    weights[1, 2] = 1
    result = overlay(picture, weights)
    assert np.array_equal(result[8:, 16:], picture[8:, 16:])
    outside = result[:8].astype(int)
    assert (outside[..., 0] >= outside[..., 1]).all(), "dark red"


def test_a_broken_item_is_named_and_the_rest_shown(lab, capsys):
    (lab.masks / "two.png").write_bytes(b"")
    out = lab.folder / "sheet"
    assert lab.run("inspect", "--masks", lab.masks, "--output", out) == 1
    captured = capsys.readouterr()
    assert "two.png is empty (0 bytes)" in captured.err
    assert "1 of 2 items, 1 problems" in captured.out
    assert len(facts(out.with_suffix(".html"))) == 1


def test_many_items_are_drawn_sheet_by_sheet(lab, capsys, monkeypatch):
    monkeypatch.setattr(cards, "SHEET", 2)
    for stem in ("five", "four", "three"):
        lab.picture(stem, mask=disc((160, 120)))
    (lab.masks / "four.png").write_bytes(b"")
    out = lab.folder / "sheet"
    assert lab.run("inspect", "--masks", lab.masks, "--output", out, "--sheet_limit", "100") == 1
    captured = capsys.readouterr()
    assert f"{out}.png and {out}.html, and 2 more sheets to {out}_3.html: 4 of 5 items, 1 problems" in captured.out
    sheets = [out, lab.folder / "sheet_2", lab.folder / "sheet_3"]
    assert sorted(path.name for path in lab.folder.glob("sheet*.png")) == ["sheet.png", "sheet_2.png", "sheet_3.png"]
    assert [len(facts(sheet.with_suffix(".html"))) for sheet in sheets] == [2, 1, 1]
    assert "Sheet 2 of 3: sheet, sheet_2, sheet_3." in sheets[1].with_suffix(".html").read_text()


@pytest.mark.parametrize("name", ["one.png", "one.html"])
def test_only_sheets_are_replaced(lab, capsys, name):
    """Who names the sheet like a picture by mistake keeps the picture."""
    path = lab.images / name
    path.write_bytes(before := path.read_bytes() if path.exists() else b"a page")
    if name == "one.html":
        (lab.images / "one.png").rename(lab.images / "other.png")
    assert lab.run("inspect", "--masks", lab.masks, "--output", lab.images / "one") == 1
    assert f"{path} is there and is no contact sheet" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_usage(lab, capsys):
    out = str(lab.folder / "sheet")
    for flags, line in (
        (["--output", out], "give --cache or --dataset_config"),
        (["--cache", str(lab.cache), "--output", out, "--mask_gamma", "0"], "gamma must be > 0"),
        (["--cache", str(lab.cache), "--output", out, "--sheet_limit", "0"], "--sheet_limit must be 1 or more"),
        (
            ["--cache", str(lab.cache), "--output", out, "--mask_blur_kernel_size", "1000001"],
            "odd integer from 1 to 1023, got 1000001",
        ),
    ):
        assert main(["inspect", *flags]) == 2
        assert line in capsys.readouterr().err
