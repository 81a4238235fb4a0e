"""The page in a real Chromium: one click, labels, clips, lists of thousands. Skipped where there is none."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.cache.support import Lab, disc, frames_of, video_lab
from tests.edit.browser import Page, running

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
SIZE = (333, 211)


def test_one_click_cuts_out_and_can_be_undone(driver, tmp_path):
    pytest.importorskip("skimage")
    from skimage import data

    (tmp_path / "photos").mkdir()
    Image.fromarray(data.coffee()).save(tmp_path / "photos" / "cup.png")
    with running("--images", "photos", "--masks", "masks", cwd=tmp_path) as server:
        page = Page(driver, server.address)
        page.open(0)
        page.tool("click")
        page.stroke([page.to_screen(150, 40), page.to_screen(460, 330)])  # a box round the cup
        page.stroke([page.to_screen(300, 180)])
        page.wait(lambda: page.data("selecting") is None)
        page.wait(lambda: not page.js("return document.getElementById('undo').disabled"))
        page.save()
        mask = np.asarray(Image.open(tmp_path / "masks" / "cup.png"))
        assert mask[180, 300] == 255
        assert mask[20, 20] == 0
        assert 0.05 < (mask > 0).mean() < 0.6
        page.key("z", 2, "KeyZ")
        page.js("location.hash = ''")


def test_labels(driver, tmp_path):
    lab = Lab(tmp_path)
    lab.picture("cat", size=SIZE)
    face = disc(SIZE, radius=0.1)
    Image.fromarray(face).save(lab.masks / "cat.face.png")
    words = ("--mask_labels", "face", "body")
    with running("--images", lab.images, "--masks", lab.masks, *words, cwd=tmp_path) as server:
        page = Page(driver, server.address)
        page.open(0)
        assert not page.js("return document.getElementById('label-choice').hidden")
        page.set("label", "face")
        page.wait(lambda: page.data("opened") == "0:0:face")
        page.wait(lambda: not page.js("return document.getElementById('facts').innerText").count("0.0000"))
        page.set("size", 40)
        page.stroke([page.to_screen(280, 180)])
        page.save()
        page.set("label", "body")
        page.wait(lambda: page.data("opened") == "0:0:body")
        page.wait(lambda: "0.0000" in page.js("return document.getElementById('facts').innerText"))
        page.stroke([page.to_screen(60, 60)])
        page.save()
        page.js("location.hash = ''")
    drawn = np.asarray(Image.open(lab.masks / "cat.face.png"))
    assert drawn[180, 280] == 255
    assert np.array_equal(drawn[:140, :240], face[:140, :240])
    body = np.asarray(Image.open(lab.masks / "cat.body.png"))
    assert body[60, 60] == 255
    assert body[180, 280] == 0
    assert not (lab.masks / "cat.png").exists()


def test_clip(driver, tmp_path):
    lab = video_lab(tmp_path, frames_of(9))
    with running("--dataset_config", lab.toml, "--masks", lab.masks, "--arch", "wan", cwd=tmp_path) as server:
        page = Page(driver, server.address)
        page.open(0)
        page.set("size", 52)
        page.stroke([page.to_screen(26, 64)])
        page.save()
        page.set("carry-to", "8")
        page.click("carry")
        page.wait(lambda: page.data("task") == "idle" and (lab.masks / "clip").exists())
        page.wait(lambda: (np.asarray(Image.open(lab.masks / "clip" / "000008.png")) > 127)[64, 95])
        page.set("onion", True)
        page.set("frame", "8")
        page.wait(lambda: page.data("opened") == "0:8")
        page.key(",")
        page.wait(lambda: page.data("opened") == "0:7")
        page.js("location.hash = ''")
        assert page.errors() == []


def test_a_list_of_thousands_keeps_the_page_small(driver, tmp_path):
    lab = Lab(tmp_path)
    path = lab.picture("p0", size=(32, 24), mask=disc((32, 24)))
    for index in range(1, 3000):
        (lab.images / f"p{index}.png").hardlink_to(path)
    with running("--images", lab.images, "--masks", lab.masks, cwd=tmp_path) as server:
        page = Page(driver, server.address)
        nodes = page.js("return document.querySelectorAll('.item').length")
        assert 0 < nodes < 100
        page.js("document.getElementById('grid').scrollTop = 1e9")
        page.wait(lambda: page.js("return document.querySelectorAll('.item').length") > 0)
        assert page.js("return document.querySelectorAll('.item').length") < 100
        page.js("document.getElementById('grid').focus()")
        page.key("End")
        selected = page.js("return document.querySelector('.item[aria-selected=true]')?.getAttribute('aria-posinset')")
        assert selected == "3000"


def test_a_mended_mask_does_not_change_what_comes_next(driver, tmp_path):
    """It sorts to the end of the list, whose worst come first."""
    lab = Lab(tmp_path)
    for index in range(3):
        lab.picture(f"p{index}", size=SIZE)
    with running("--images", lab.images, "--masks", lab.masks, cwd=tmp_path) as server:
        page = Page(driver, server.address)
        page.wait(lambda: page.js("return document.getElementById('space').textContent").count("no mask") == 3)
        page.open(0)
        page.stroke([page.to_screen(150, 100), page.to_screen(180, 110)])
        page.save()
        # Of a hidden list the first two are in the page.
        page.wait(lambda: page.js("return document.getElementById('item-0') === null"))
        page.key("PageDown")
        page.wait(lambda: page.data("opened") == "1:0")
        page.js("location.hash = ''")
