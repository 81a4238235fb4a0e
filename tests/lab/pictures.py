"""The pictures, clips, captions and masks that the lab trains on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = {**{f"img{index}": (256, 256) for index in range(6)}, "img6": (384, 256), "img7": (200, 320)}  # width, height
WITH_ALPHA = ("img4", "img5")
CLIP_FRAMES, CLIP_SIDE = 9, 128


def picture_masks() -> dict[str, np.ndarray]:
    """A mask for each picture, uint8 (height, width): halves, a soft disc, all white, one of 2 x 2 latent cells, boxes."""
    masks = {}
    for name, (width, height) in SIZES.items():
        mask = np.zeros((height, width), np.uint8)
        if name == "img0":
            mask[:, width // 2 :] = 255
        elif name == "img1":
            y, x = np.mgrid[:height, :width]
            mask[:] = np.clip((100 - np.hypot(x - width / 2, y - height / 2)) / 40, 0, 1) * 255
        elif name == "img2":
            mask[:] = 255
        elif name == "img3":
            mask[32:48, 64:80] = 255
        elif name in WITH_ALPHA:
            mask[40:200, 56:180] = 255
        else:
            mask[:, : width // 3] = 255
        masks[name] = mask
    return masks


def write_pictures(fixture: Path) -> None:
    """Pictures of waves and noise with captions in `images`, their masks in `masks`, white ones in `masks_white`."""
    random = np.random.default_rng(0)
    for folder in ("images", "masks", "masks_white"):
        (fixture / folder).mkdir(parents=True, exist_ok=True)
    for index, (name, mask) in enumerate(picture_masks().items()):
        height, width = mask.shape
        y, x = np.mgrid[:height, :width]
        waves = [
            127 + 127 * np.sin(x / (7 + index)),
            127 + 127 * np.cos(y / (11 + index)),
            (x + y) * 255 / (width + height),
        ]
        pixels = np.stack(waves, -1) + random.normal(0, 12, (height, width, 3))
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        if name in WITH_ALPHA:
            picture.putalpha(Image.fromarray(mask))
        picture.save(fixture / "images" / f"{name}.png")
        (fixture / "images" / f"{name}.txt").write_text(f"synthetic pattern number {index}")
        Image.fromarray(mask).save(fixture / "masks" / f"{name}.png")
        Image.new("L", (width, height), 255).save(fixture / "masks_white" / f"{name}.png")


def write_clips(fixture: Path) -> None:
    """Two clips of a moving block; `video_masks` has a still mask for the first and a mask video for the second."""
    for folder in ("videos", "video_masks"):
        (fixture / folder).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:CLIP_SIDE, :CLIP_SIDE]
    for clip in range(2):
        frames = []
        masks = np.zeros((CLIP_FRAMES, CLIP_SIDE, CLIP_SIDE, 3), np.uint8)
        for t in range(CLIP_FRAMES):
            waves = [127 + 127 * np.sin((x + 3 * t) / (6 + clip)), 127 + 127 * np.cos((y - 2 * t) / 9), (x + y) / 2]
            frame = np.stack(waves, -1)
            block = np.s_[32:96, 16 + 6 * t : 56 + 6 * t]
            frame[block], masks[t][block] = (255, 40 + 60 * clip, 0), 255
            frames.append(np.clip(frame, 0, 255).astype(np.uint8))
        write_clip(fixture / "videos" / f"vid{clip}.mp4", frames)
        (fixture / "videos" / f"vid{clip}.txt").write_text(f"a moving block, clip {clip}")
        if clip == 0:
            Image.fromarray(masks.max(axis=0)[..., 0]).save(fixture / "video_masks" / "vid0.png")
        else:
            write_clip(fixture / "video_masks" / "vid1.mp4", masks)


def write_clip(path: Path, frames: Sequence[np.ndarray]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt, stream.options = CLIP_SIDE, CLIP_SIDE, "yuv420p", {"crf": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
