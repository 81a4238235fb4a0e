"""What the functions of a real trainer made of pictures, buckets and frames: run as a script, it writes the two files.

    MUSUBI_REPO=/path/to/musubi-tuner python tests/support/trainer_geometry.py

Made with kohya-ss/musubi-tuner v0.3.4: `resize_image_to_bucket`, `BucketSelector` and `load_video`. Run it again only for a
version of the trainer that treats pictures differently; the tests that have the checkout compare with it directly.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

GEOMETRY = Path(__file__).with_name("expected_geometry.npz")
SELECTION = Path(__file__).with_name("expected_selection.json")
STORED = json.loads(SELECTION.read_text(encoding="utf-8"))
# (width, height) of the picture, (width, height) of the bucket: down, up, mixed, odd, equal, extreme.
RESIZES = [
    ((100, 75), (64, 48)),
    ((97, 61), (48, 32)),
    ((31, 45), (48, 64)),
    ((40, 40), (64, 32)),
    ((64, 33), (64, 32)),
    ((48, 64), (48, 64)),
    ((200, 9), (32, 48)),
    ((3, 50), (32, 32)),
    ((1, 1), (16, 32)),
    ((65, 129), (32, 64)),
]
SIZES = [(256, 256), (384, 256), (200, 320), (1920, 1080), (1080, 1920), (333, 1000), (64, 64), (5000, 700), (513, 511)]
SETTINGS = [((256, 256), True, False), ((960, 544), True, False), ((960, 544), True, True), ((640, 480), False, False)]
RATES = [
    (30.0, 16.0),
    (23.976, 24.0),
    (24.0, 16.0),
    (60.0, 24.0),
    (29.97, 16.0),
    (10.0, 24.0),
    (16.0, 16.0),
    (25.0, 24.0),
]


def picture(size: tuple[int, int], seed: int) -> np.ndarray:
    """A grey picture with soft and hard parts."""
    rng = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    soft = 127 + 127 * np.sin(x / 5 + seed) * np.cos(y / 7)
    hard = np.where((x // 6 + y // 9) % 2 == 0, 0, 255)
    return np.where(rng.random((height, width)) < 0.1, hard, soft).clip(0, 255).astype(np.uint8)


def main() -> None:
    sys.path.insert(0, str(Path(os.environ["MUSUBI_REPO"]) / "src"))
    from musubi_tuner.dataset.bucket import BucketSelector
    from musubi_tuner.dataset.media_utils import load_video, resize_image_to_bucket

    arrays = {}
    for index, (size, bucket) in enumerate(RESIZES):
        arrays[f"resize_{index}"] = resize_image_to_bucket(Image.fromarray(picture(size, index)), bucket)
    np.savez_compressed(GEOMETRY, **arrays)

    buckets = []
    for resolution, enable, no_upscale in SETTINGS:
        selector = BucketSelector(resolution, enable, no_upscale, "wan")
        chosen = [[int(side) for side in selector.get_bucket_resolution(size)] for size in SIZES]
        buckets.append({"resolution": resolution, "enable": enable, "no_upscale": no_upscale, "buckets": chosen})
    kept = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(120):
            Image.new("RGB", (1, 1), (index, 0, 0)).save(f"{folder}/{index:03d}.png")
        for source, target in RATES:
            frames = load_video(folder, source_fps=source, target_fps=target)
            kept.append({"source": source, "target": target, "frames": [int(frame[0, 0, 0]) for frame in frames]})
    made = "kohya-ss/musubi-tuner v0.3.4, by tests/support/trainer_geometry.py; frames of a folder of 120 pictures"
    text = json.dumps({"made_with": made, "sizes": SIZES, "buckets": buckets, "kept": kept})
    SELECTION.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
