"""The page of `masked-loss edit` in a real headless Chromium, driven by pointer and keyboard events."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
QUIET = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars")  # fmt: skip


class Server:
    """A running `masked-loss edit`: the command itself, as a user starts it."""

    def __init__(self, *words: str | Path, cwd: Path) -> None:
        command = [sys.executable, "-m", "masked_loss_triton", "edit", "--no_browser", *map(str, words)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"http://\S+", line)
        if match is None:
            raise AssertionError(line + self.process.communicate(timeout=10)[1])
        self.address = match[0]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def running(*words: str | Path, cwd: Path) -> Iterator[Server]:
    server = Server(*words, cwd=cwd)
    try:
        yield server
    finally:
        server.stop()


def open_browser(profile: Path) -> Any:
    """A new Chromium with an empty profile. Skips the test, saying so, where none is installed."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*QUIET, f"--user-data-dir={profile}", "--window-size=1300,850"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    os.environ.setdefault("SE_OFFLINE", "true")
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))


class Page:
    """One tab with the page in it."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver = driver
        driver.get("about:blank")
        driver.get_log("browser")  # what a page of a server that has ended complained of
        driver.get(address)
        self.wait(lambda: self.data("ready") == "yes")

    def data(self, name: str) -> str | None:
        return self.driver.execute_script("return document.body.dataset[arguments[0]]", name)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def wait(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.js("return document.body.innerText")
            time.sleep(0.02)

    def open(self, number: int) -> None:
        """Opens a picture by its address, as a bookmark would."""
        self.js("location.hash = '#' + arguments[0]", number)
        self.wait(lambda: (self.data("opened") or "").startswith(f"{number}:"))
        self.wait(lambda: self.js("return document.activeElement.id") == "canvas")
        # The canvas takes its size when the page is laid out, and is painted with the next frame.
        self.driver.execute_async_script(
            "const done = arguments[0], next = requestAnimationFrame; next(() => next(() => next(done)))"
        )

    def set(self, control: str, value: float | str | bool) -> None:
        """Moves a control and tells the page, as a hand does."""
        self.js(
            "const e = document.getElementById(arguments[0]);"
            "if (e.type === 'checkbox') e.checked = arguments[1]; else e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true})); e.dispatchEvent(new Event('change', {bubbles: true}))",
            control,
            value,
        )

    def click(self, control: str) -> None:
        self.driver.find_element("id", control).click()

    def tool(self, name: str) -> None:
        self.driver.find_element("css selector", f"[data-tool={name}]").click()

    def key(self, key: str, modifiers: int = 0, code: str = "") -> None:
        """One key, pressed and released; modifiers: 1 Alt, 2 Control, 8 Shift."""
        text = {"text": key} if len(key) == 1 and modifiers in (0, 8) else {}
        for kind in ("keyDown", "keyUp"):
            event = {"type": kind, "key": key, "code": code or key, "modifiers": modifiers}
            self.driver.execute_cdp_cmd("Input.dispatchKeyEvent", {**event, **(text if kind == "keyDown" else {})})

    def view(self) -> dict[str, float]:
        """Where the picture stands: scale, its corner on the canvas (x, y) and that of the canvas (left, top), CSS pixels."""
        return self.js(
            "const c = document.getElementById('canvas'), b = c.getBoundingClientRect();"
            "return {...JSON.parse(c.dataset.view), left: b.left, top: b.top}"
        )

    def to_screen(self, x: float, y: float) -> tuple[int, int]:
        """The pixel of the screen at a place of the picture."""
        view = self.view()
        return round(view["left"] + view["x"] + x * view["scale"]), round(view["top"] + view["y"] + y * view["scale"])

    def to_picture(self, point: tuple[int, int]) -> tuple[float, float]:
        """What the page makes of a pixel of the screen, in the same arithmetic."""
        view = self.view()
        x = (point[0] - view["left"] - view["x"]) / view["scale"]
        return x, (point[1] - view["top"] - view["y"]) / view["scale"]

    def mouse(self, kind: str, point: tuple[int, int], button: str = "left", modifiers: int = 0) -> None:
        held = {"left": 1, "right": 2, "middle": 4, "none": 0}[button]
        self.driver.execute_cdp_cmd(
            "Input.dispatchMouseEvent",
            {"type": kind, "x": point[0], "y": point[1], "button": button, "clickCount": 1, "modifiers": modifiers,
             "buttons": 0 if kind == "mouseReleased" else held},
        )  # fmt: skip

    def stroke(self, points: list[tuple[int, int]], button: str = "left") -> None:
        """Presses, moves through points of the screen, and releases."""
        self.mouse("mousePressed", points[0], button)
        for point in points[1:]:
            self.mouse("mouseMoved", point, button)
        self.mouse("mouseReleased", points[-1], button)

    def save(self) -> None:
        before = int(self.data("saves") or 0)
        self.key("s", 2, "KeyS")
        self.wait(lambda: int(self.data("saves") or 0) > before)

    def previewed(self) -> int:
        return int(self.data("previews") or 0)

    def errors(self) -> list[str]:
        """What the page complained about in the console, but for answers that it shows to the user."""
        lines = self.driver.get_log("browser")
        return [line["message"] for line in lines if "the server responded with a status of 4" not in line["message"]]

    def screenshot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


def draw_line(
    mask: np.ndarray, start: tuple[float, float], end: tuple[float, float], radius: float, value: int
) -> None:
    """A round brush along a line by numpy: the pixels whose centres are within the radius of it."""
    height, width = mask.shape
    y, x = np.mgrid[0:height, 0:width] + 0.5
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = dx * dx + dy * dy
    px, py = x - start[0], y - start[1]
    t = np.clip((px * dx + py * dy) / length, 0, 1) if length else np.zeros_like(px)
    mask[(px - t * dx) ** 2 + (py - t * dy) ** 2 <= radius * radius] = value


def settings(**values: Any) -> str:
    return json.dumps(values)
