"""The page in a real Chromium: strokes, undo, saving, previews, keyboard, touch, two tabs. Skipped where there is none."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from masked_loss_triton import MaskedLossConfig, mask_weights
from tests.cache.support import Lab, disc
from tests.edit.browser import Page, draw_line, running

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
SIZE = (333, 211)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("page"), resolution=(256, 192))
    for index in range(3):
        lab.picture(f"photo{index}", size=SIZE, mask=disc(SIZE, radius=0.2) if index else None)
    with running("--images", lab.images, "--masks", lab.masks, cwd=lab.folder) as server:
        server.lab = lab
        yield server


@pytest.fixture
def page(driver, server):
    for file in server.lab.masks.glob("*.png"):
        file.unlink()
    page = Page(driver, server.address)
    page.open(0)
    yield page
    assert page.errors() == []
    page.js("window.onbeforeunload = null; location.hash = ''")


def saved(server, name="photo0") -> np.ndarray:
    with Image.open(server.lab.masks / f"{name}.png") as image:
        assert image.mode == "L"
        return np.asarray(image).copy()


def test_strokes_are_those_of_numpy(page, server):
    truth = np.zeros(SIZE[::-1], np.uint8)
    for points, button, size, value in (
        ([(100, 60), (200, 120), (150, 180)], "left", 31, 255),
        ([(150, 100), (180, 110)], "right", 12, 255),  # the right button erases
        ([(250, 50), (250, 50)], "left", 55, 128),
        ([(2, 3), (330, 205)], "left", 1, 77),
        ([(-3, 100), (60, 230)], "left", 24, 200),  # over the edge
    ):
        page.set("size", size)
        page.set("value", value)
        screen = [page.to_screen(*point) for point in points]
        page.stroke(screen, button)
        places = [page.to_picture(point) for point in screen]
        draw_line(truth, places[0], places[0], size / 2, 0 if button == "right" else value)
        for start, end in zip(places, [*places[1:], places[-1]], strict=True):
            draw_line(truth, start, end, size / 2, 0 if button == "right" else value)
        page.save()
        assert np.array_equal(saved(server), truth), points
    assert len(np.unique(truth)) == 5


def test_rectangle_polygon_and_fill(page, server):
    truth = np.zeros(SIZE[::-1], np.uint8)
    y, x = np.mgrid[0 : SIZE[1], 0 : SIZE[0]] + 0.5
    page.tool("rectangle")
    screen = [page.to_screen(20, 20), page.to_screen(120, 90)]
    page.stroke(screen)
    (x0, y0), (x1, y1) = map(page.to_picture, screen)
    truth[(x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)] = 255
    page.tool("polygon")
    page.set("value", 100)
    corners = [page.to_screen(*point) for point in ((200, 30), (300, 80), (230, 190))]
    for corner in corners:
        page.stroke([corner])
    page.key("Enter")
    inside = np.zeros_like(truth, bool)
    points = [page.to_picture(corner) for corner in corners]
    for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
        crosses = (ay <= y) != (by <= y)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside ^= crosses & (x > ax + (y - ay) / (by - ay) * (bx - ax))
    truth[inside] = 100
    page.tool("fill")
    page.set("value", 30)
    page.stroke([page.to_screen(10, 200)])
    truth[truth == 0] = 30  # all black pixels hang together
    page.save()
    assert np.array_equal(saved(server), truth)


@pytest.mark.slow
def test_200_edits_undone_and_redone(page, server):
    draw = random.Random(0)
    states = []
    for _ in range(200):
        page.set("size", draw.randint(1, 90))
        page.set("value", draw.randint(0, 255))
        page.tool(draw.choice(["brush", "brush", "brush", "eraser", "rectangle", "fill"]))
        place = [(draw.uniform(-10, SIZE[0] + 10), draw.uniform(-5, SIZE[1] + 5)) for _ in range(draw.randint(1, 4))]
        page.stroke([page.to_screen(*point) for point in place], draw.choice(["left", "left", "right"]))
        states.append(not page.js("return document.getElementById('undo').disabled"))
    page.save()
    end = saved(server)
    steps = 0
    while not page.js("return document.getElementById('undo').disabled"):
        page.key("z", 2, "KeyZ")
        steps += 1
    assert steps > 100
    page.save()
    assert not saved(server).any()
    for _ in range(steps):
        page.key("y", 2, "KeyY")
    assert page.js("return document.getElementById('redo').disabled")
    page.save()
    assert np.array_equal(saved(server), end)


def test_the_preview_shows_mask_weights(page, server):
    page.set("size", 120)
    page.stroke([page.to_screen(100, 100), page.to_screen(200, 120)])
    before = page.previewed()
    page.set("gamma", 0.5)
    page.set("min_weight", 0.1)
    page.wait(lambda: page.previewed() >= before + 2)
    page.save()
    flags = page.js("return document.getElementById('flags').value")
    assert flags == "--use_mask_loss --mask_gamma 0.5 --mask_min_weight 0.1"
    width, height, grey = page.js(
        "const c = document.getElementById('weights');"
        "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        "return [c.width, c.height, Array.from(d.filter((_, i) => i % 4 === 0))]"
    )
    from masked_loss_triton.masks.geometry import resize_to_bucket, to_latent

    cells = to_latent(resize_to_bucket(saved(server), (width * 8, height * 8)), (height, width)).astype(np.float16)
    config = MaskedLossConfig(gamma=0.5, min_weight=0.1)
    w, _ = mask_weights(torch.from_numpy(cells.astype(np.float32))[None, None], config, shape=(1, 1, height, width))
    assert np.array_equal(np.floor(w[0, 0].numpy() * 255 + 0.5).astype(int).ravel(), grey)
    assert f"{w.mean():.4f}" in page.js("return document.getElementById('facts').innerText")


def test_by_keyboard_alone(driver, server):
    for file in server.lab.masks.glob("*.png"):
        file.unlink()
    page = Page(driver, server.address)
    page.js(
        "document.getElementById('sort').value = 'name'; document.getElementById('sort').dispatchEvent(new Event('input'))"
    )
    page.js("document.getElementById('grid').focus()")
    page.key("ArrowRight")
    page.key("Enter")
    page.wait(lambda: page.data("opened") == "1:0")
    page.wait(lambda: page.js("return document.activeElement.id") == "canvas")
    for _ in range(3):
        page.key("]")
    page.key("d")  # pen down in the middle
    for _ in range(5):
        page.key("ArrowRight")
    page.key("d")
    page.save()
    drawn = saved(server, "photo1")
    rows, columns = np.nonzero(drawn)
    assert drawn[SIZE[1] // 2, SIZE[0] // 2] == 255
    assert columns.max() - columns.min() > rows.max() - rows.min() + 30
    page.key("o")
    page.wait(lambda: page.js("return document.getElementById('mark-ok').getAttribute('aria-pressed')") == "true")
    page.key("PageDown")
    page.wait(lambda: page.data("opened") == "2:0")
    page.key("Escape")
    page.wait(lambda: page.js("return document.activeElement.id") == "grid")
    # Every control says what it is.
    assert (
        page.js(
            "return [...document.querySelectorAll('button, input, select, textarea, canvas')].filter((e) =>"
            "!(e.innerText?.trim() || e.labels?.length || e.getAttribute('aria-label'))).map((e) => e.outerHTML)"
        )
        == []
    )
    # What was reviewed is known to the next session.
    with running("--images", server.lab.images, "--masks", server.lab.masks, cwd=server.lab.folder) as second:
        page = Page(driver, second.address)
        page.wait(lambda: "1 reviewed" in page.js("return document.getElementById('count').value"))
    assert page.errors() == [] or all("ERR_" in line for line in page.errors())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 390])
def test_axe_finds_nothing(driver, server, scheme, width):
    axe = pytest.importorskip("axe_core_python")
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 850, "deviceScaleFactor": 1, "mobile": width < 800}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Page(driver, server.address)
        page.js((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
        for number in (None, 1):
            if number is not None:
                page.open(number)
            found = page.driver.execute_async_script(
                "axe.run().then((found) => arguments[0](found.violations.map((one) => [one.id, one.nodes[0].html])))"
            )
            assert found == []
            assert page.js("return document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out sideways"
    finally:
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_touch(page, server):
    page.set("size", 30)
    start = page.to_screen(150, 100)

    def touch(kind, *points):
        event = {"type": kind, "touchPoints": [{"x": x, "y": y, "id": index} for index, (x, y) in enumerate(points)]}
        page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", event)

    touch("touchStart", start)
    touch("touchMove", (start[0] + 60, start[1]))
    touch("touchEnd")
    page.save()
    one = saved(server)
    assert one.any()
    scale = page.view()["scale"]
    touch("touchStart", start)
    touch("touchStart", start, (start[0] + 50, start[1]))
    touch("touchMove", (start[0] - 50, start[1]), (start[0] + 100, start[1]))
    touch("touchEnd")
    page.wait(lambda: page.view()["scale"] > 1.5 * scale)
    page.save()
    assert np.array_equal(saved(server), one), "two fingers move and enlarge, and draw nothing"


def test_two_tabs(page, server):
    page.stroke([page.to_screen(50, 50), page.to_screen(80, 80)])
    other = np.full(SIZE[::-1], 7, np.uint8)
    Image.fromarray(other).save(server.lab.masks / "photo0.png")
    page.key("s", 2, "KeyS")
    page.wait(lambda: page.js("return document.getElementById('question').open"))
    assert "changed by another" in page.js("return document.getElementById('question').innerText")
    page.js("[...document.querySelectorAll('#question button')].find((b) => b.value === 'cancel').click()")
    assert np.array_equal(saved(server), other)
    page.key("s", 2, "KeyS")
    page.wait(lambda: page.js("return document.getElementById('question').open"))
    page.js("[...document.querySelectorAll('#question button')].find((b) => b.value === 'mine').click()")
    page.wait(lambda: not np.array_equal(saved(server), other))
    assert saved(server).max() == 255


def test_unsaved_edits_are_asked_about(page, server):
    page.stroke([page.to_screen(50, 50), page.to_screen(80, 80)])
    page.key("PageDown")
    page.wait(lambda: page.js("return document.getElementById('question').open"))
    page.js("[...document.querySelectorAll('#question button')].find((b) => b.value === 'stay').click()")
    assert page.data("opened") == "0:0"
    page.key("PageDown")
    page.wait(lambda: page.js("return document.getElementById('question').open"))
    page.js("[...document.querySelectorAll('#question button')].find((b) => b.value === 'save').click()")
    page.wait(lambda: page.data("opened") != "0:0")
    assert saved(server).any()
