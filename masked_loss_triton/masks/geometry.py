"""From the pixels of a picture to the cells of its latents, exactly as musubi-tuner treats the picture.

Space: scale to cover the bucket, crop its centre, then average the pixels of each latent cell.
Time: a causal VAE codes frame 0 alone and then groups of frames: latent k > 0 covers frames s(k-1)+1 to sk.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

# Above this many pixels the scaled picture is not built whole: a 20000x1 mask would need gigabytes for a 256x256 crop.
WHOLE_RESIZE_LIMIT = 64_000_000
# More than the three pixels that a Lanczos window reaches when enlarging.
MARGIN = 8


def cover(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Returns the size to which a picture is scaled to cover its bucket, and the corner where the bucket is cut out of it.

    Args:
        size: (width, height), pixels.
        bucket: likewise.

    Source: musubi-tuner 0.3.4, dataset/media_utils.py.
    """
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    width, height = int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)
    return (width, height), ((width - bucket[0]) // 2, (height - bucket[1]) // 2)


def resize_to_bucket(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scales a picture or mask to cover the bucket and crops the centre, as musubi-tuner's dataset does.

    See `cover` for the sizes; Lanczos (Pillow) to enlarge, else area (OpenCV).
    Four channels are taken for colours with alpha and resized apart: enlarging them together would darken the colours
    of transparent pixels.

    Args:
        array: (H, W) or (H, W, C), C 3 or 4; uint8, or float32 in [0, 1] (no C).
        size: (width, height) of the bucket, pixels.

    Returns:
        (height, width[, C]) in the dtype of `array`. uint8 equals the trainer's function bit for bit, float32 to 1/255.

    Source: musubi-tuner 0.3.4, dataset/media_utils.py.
    """
    if array.dtype != np.uint8 and (array.dtype != np.float32 or array.ndim != 2):
        raise TypeError(f"array must be uint8, or float32 with shape (H, W); got {array.dtype} {array.shape}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or 0 in array.shape:
        raise ValueError(f"array must be (H, W), (H, W, 3) or (H, W, 4) and not empty; got {array.shape}")
    if array.ndim == 3 and array.shape[2] == 4:
        alpha = resize_to_bucket(array[..., 3], size)
        return np.dstack([resize_to_bucket(array[..., :3], size), alpha])

    height, width = array.shape[:2]
    if (width, height) == tuple(size):
        return np.ascontiguousarray(array)
    whole, (left, top) = cover((width, height), size)
    if max(size[0] / width, size[1] / height) > 1:
        return _enlarge(array, whole, (left, top), size)
    import cv2

    scaled = cv2.resize(np.ascontiguousarray(array), whole, interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(scaled[top : top + size[1], left : left + size[0]])


def _enlarge(array: np.ndarray, scaled: tuple[int, int], corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    if array.dtype == np.float32:
        # Pillow clips 8-bit Lanczos to [0, 255] after each of its two passes and float Lanczos never. On hard edges the two
        # differ by up to 49/255, so a float mask takes the 8-bit road, on which the trainer sends the picture.
        levels = np.rint(array * np.float32(255)).astype(np.uint8)
        return _enlarge(levels, scaled, corner, size).astype(np.float32) / np.float32(255)
    image = Image.fromarray(np.ascontiguousarray(array))
    (left, top), (width, height) = corner, size
    if scaled[0] * scaled[1] <= WHOLE_RESIZE_LIMIT:
        whole = np.asarray(image.resize(scaled, Image.Resampling.LANCZOS))
        return np.ascontiguousarray(whole[top : top + height, left : left + width])
    x, y = image.width / scaled[0], image.height / scaled[1]
    # Equal up to rounding, but for hard edges where Pillow runs its two passes in another order than for the whole.
    # Pillow keeps the box in single precision: cut to the neighbourhood of the crop, its numbers are small and exact enough.
    x0, y0 = max(0, int(left * x) - MARGIN), max(0, int(top * y) - MARGIN)
    x1, y1 = int((left + width) * x) + 1 + MARGIN, int((top + height) * y) + 1 + MARGIN
    part = image.crop((x0, y0, min(x1, image.width), min(y1, image.height)))
    box = (left * x - x0, top * y - y0, (left + width) * x - x0, (top + height) * y - y0)
    return np.array(part.resize(size, Image.Resampling.LANCZOS, box=box))


def to_latent(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Averages the pixels of each latent cell (adaptive average, `F.interpolate(mode="area")`).

    Args:
        mask: (H, W) float32 in [0, 1] or uint8 in [0, 255].
        size: (h, w) of the latents, cells.

    Returns:
        (h, w) float32 in [0, 1].
    """
    values = mask if mask.dtype == np.float32 else mask.astype(np.float32) / np.float32(255)
    (height, width), (rows, columns) = values.shape, size
    if height % rows == 0 and width % columns == 0:
        import cv2

        result = cv2.resize(np.ascontiguousarray(values), (columns, rows), interpolation=cv2.INTER_AREA)
        return np.clip(result, 0, 1)
    sums = np.cumsum(np.cumsum(np.pad(values, ((1, 0), (1, 0))), axis=0, dtype=np.float64), axis=1)
    top, bottom = _windows(height, rows)
    left, right = _windows(width, columns)
    total = sums[bottom][:, right] - sums[top][:, right] - sums[bottom][:, left] + sums[top][:, left]
    area = (bottom - top)[:, None] * (right - left)[None, :]
    return np.clip(total / area, 0, 1).astype(np.float32)


def _windows(pixels: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel and one past the last pixel of each cell."""
    index = np.arange(cells)
    return index * pixels // cells, -((index + 1) * pixels // -cells)


def group_frames(frames: np.ndarray, latent_frames: int, reduce: str = "mean") -> np.ndarray:
    """Brings per-frame masks to the time steps of the latents.

    Latent 0 is frame 0; latent k covers frames s(k-1)+1 to sk, where s = (T - 1) / (F - 1): 4 for a causal video VAE.

    Args:
        frames: (T, ...) float32; T = 1 is a still, repeated.
        latent_frames: F, time steps of the latents.
        reduce: "mean", or "max", which keeps what was masked in any frame of the group.

    Returns:
        (F, ...) float32.

    Raises:
        ValueError: when T frames cannot have become F latents.
    """
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce must be 'mean' or 'max', got {reduce!r}")
    count = len(frames)
    if count == 1:
        return np.repeat(frames, latent_frames, axis=0)
    if count == latent_frames:
        return frames
    stride = frames_per_latent(count, latent_frames)
    groups = frames[1:].reshape(latent_frames - 1, stride, *frames.shape[1:])
    reduced = groups.mean(axis=1, dtype=np.float32) if reduce == "mean" else groups.max(axis=1)
    return np.concatenate([frames[:1], reduced])


def frames_per_latent(count: int, latent_frames: int) -> int:
    """Returns how many of `count` frames go into each latent frame but the first, which is one frame alone.

    Raises:
        ValueError: when so many frames cannot have become so many latent frames.
    """
    if count == latent_frames:
        return 1
    if latent_frames < 2 or (count - 1) % (latent_frames - 1):
        raise ValueError(f"{count} frames cannot be grouped into {latent_frames} latent frames (4k+1 frames give k+1)")
    return (count - 1) // (latent_frames - 1)
