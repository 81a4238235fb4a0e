"""How long the page of `masked-loss edit` takes: its list of many pictures, and a preview, in a real Chromium.

    python -m bench.edit_page                # 10,000 pictures, a mask of 1024 x 1024

The command is started as a user starts it; times are those that the page itself measures.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from bench.environment import device_name
from tests.edit.browser import Page, open_browser, running


def list_seconds(folder: Path, items: int) -> float:
    """Seconds from the request of the page until the list of so many pictures is there."""
    (folder / "many").mkdir()
    Image.new("RGB", (64, 48), "grey").save(folder / "many" / "0.png")
    for index in range(1, items):
        (folder / "many" / f"{index}.png").hardlink_to(folder / "many" / "0.png")
    driver = open_browser(folder / "profile")
    with running("--images", "many", "--masks", "many_masks", cwd=folder) as server:
        page = Page(driver, server.address)
        loaded = page.js("return performance.timing.navigationStart")
        ready = page.js(
            "return performance.timeOrigin + performance.getEntriesByType('resource').filter("
            "(one) => one.name.endsWith('api/items'))[0].responseEnd"
        )
        page.wait(lambda: page.js("return document.querySelectorAll('.item').length") > 0)
        seconds = (ready - loaded) / 1000 + float(page.data("listMs") or 0) / 1000
        driver.quit()
    return seconds


def preview_milliseconds(folder: Path, side: int, rounds: int) -> list[float]:
    """Milliseconds from a changed setting to the weights on the screen, for a picture of side x side pixels."""
    (folder / "one").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "one" / "picture.png")
    driver = open_browser(folder / "profile2")
    times = []
    with running("--images", "one", "--masks", "one_masks", cwd=folder) as server:
        page = Page(driver, server.address)
        page.open(0)
        page.set("size", 300)
        page.stroke([page.to_screen(side * 0.3, side * 0.3), page.to_screen(side * 0.7, side * 0.6)])
        for index in range(rounds):
            before = page.previewed()
            page.set("gamma", 0.5 + 0.05 * (index % 20))
            page.wait(lambda seen=before: page.previewed() > seen)
            times.append(float(page.data("previewMs") or 0))
        driver.quit()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(device_name())
        print(f"list of {options.items} pictures: {list_seconds(folder, options.items):.2f} s")
        times = preview_milliseconds(folder, options.side, options.rounds)
        print(
            f"preview at {options.side}x{options.side}: median {statistics.median(times):.0f} ms, "
            f"slowest of {options.rounds} {max(times):.0f} ms"
        )


if __name__ == "__main__":
    main()
