"""A fixed linear picture encoder that stands in for a video VAE: no VAE weights can be shipped with this package.

A lapped transform: samples on both sides of every border between 8x8 blocks are mixed, then each block is brought to
frequencies by a DCT. Of the 192 numbers of a block 16 are kept, the size and channel count of HunyuanVideo, WAN and
Qwen-Image latents: the 10 lowest frequencies of its brightness and the 3 lowest of each of two colour differences. The
transform is orthonormal, so its transpose decodes, the decoded picture is the closest that these numbers can describe, and
no grid of blocks shows in it. As in WAN's VAE, the channels are then shifted and scaled by constants, here `CHANNEL_MEAN` and
`CHANNEL_SCALE`, to a variance near 1. What the demo shows about masks does not depend on the encoder; how sharp its pictures
look does.

Source of the lapped transform: H. S. Malvar, Signal Processing with Lapped Transforms (1992), factored into a filter before
the DCT as in T. D. Tran, J. Liang and C. Tu, Lapped Transform via Time-Domain Pre- and Post-Filtering (2003).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

PATCH = 8
CHANNELS = 16
# Brightness, red against blue, green against both: orthonormal, so lengths in colour space are kept.
COLOUR_AXES = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])
LUMA_ORDER = 3  # frequencies (u, v) with u + v <= 3: ten of them
CHROMA_ORDER = 1  # (0, 0), (0, 1), (1, 0): three for each colour axis


def _frequencies() -> list[tuple[int, int, int]]:
    """(colour axis, vertical frequency u, horizontal frequency v) of each channel, low frequencies first."""
    channels = []
    for axis, order in ((0, LUMA_ORDER), (1, CHROMA_ORDER), (2, CHROMA_ORDER)):
        pairs = [(u, total - u) for total in range(order + 1) for u in range(total + 1)]
        channels += [(axis, u, v) for u, v in pairs]
    return channels


AXES, ROWS, COLUMNS = (list(indices) for indices in zip(*_frequencies(), strict=True))
# From the demo's photographs, RGB in [-1, 1]: each channel's mean, and the square root of its standard deviation, rounded.
# Over all channels the variance is then about 1. Dividing by the whole deviation makes faint detail as loud as the large
# shapes, and a model this small then learns neither; dividing by nothing drowns the detail altogether.
_MEAN = [-2.5, *[0.0] * 9, 1.5, 0.0, 0.0, 0.3, 0.0, 0.0]
_SCALE = [2.5, 1.1, 1.1, 0.8, 0.8, 0.8, 0.6, 0.6, 0.6, 0.6, 1.7, 0.6, 0.6, 1.0, 0.4, 0.4]
CHANNEL_MEAN = np.array(_MEAN).reshape(CHANNELS, 1, 1)
CHANNEL_SCALE = np.array(_SCALE).reshape(CHANNELS, 1, 1)


def _dct(length: int, shift: float) -> np.ndarray:
    """Rows are cosines of the frequencies k + `shift`: 0 gives the DCT-II, 0.5 the DCT-IV; both orthonormal."""
    position = (np.arange(length) + 0.5) * math.pi / length
    cosines = np.cos((np.arange(length)[:, None] + shift) * position)
    rows: np.ndarray = cosines / np.linalg.norm(cosines, axis=1, keepdims=True)
    return rows


@functools.lru_cache(maxsize=8)
def analysis_matrix(length: int) -> np.ndarray:
    """The transform of `length` samples, a multiple of 8, to as many coefficients, 8 for each block: orthonormal, float64."""
    half = PATCH // 2
    same, mirrored, zero = np.eye(half), np.eye(half)[::-1], np.zeros((half, half))
    butterfly = np.block([[same, mirrored], [mirrored, -same]]) / math.sqrt(2)
    rotation = mirrored @ _dct(half, 0.0).T @ _dct(half, 0.5) @ mirrored
    border = butterfly @ np.block([[same, zero], [zero, rotation]]) @ butterfly
    filtered = np.eye(length)
    for start in range(half, length - half, PATCH):
        filtered[start : start + PATCH, start : start + PATCH] = border
    matrix: np.ndarray = np.kron(np.eye(length // PATCH), _dct(PATCH, 0.0)) @ filtered
    return matrix


def encode(rgb: np.ndarray) -> Tensor:
    """Encodes one picture.

    Args:
        rgb: uint8 (H, W, 3), H and W multiples of 8.
    Returns:
        float32 latents (16, 1, H/8, W/8): channels, one frame, height, width.
    Raises:
        ValueError: for another dtype or shape.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"rgb must be uint8 (H, W, 3), got {rgb.dtype} {rgb.shape}")
    height, width = rgb.shape[:2]
    if not height or not width or height % PATCH or width % PATCH:
        raise ValueError(f"rgb must have a height and width that are multiples of {PATCH}, got {height}x{width}")
    colours = np.moveaxis((rgb / 127.5 - 1) @ COLOUR_AXES.T, 2, 0)
    every = analysis_matrix(height) @ colours @ analysis_matrix(width).T
    blocks = every.reshape(3, height // PATCH, PATCH, width // PATCH, PATCH)
    kept = (blocks[AXES, :, ROWS, :, COLUMNS] - CHANNEL_MEAN) / CHANNEL_SCALE
    return torch.from_numpy(kept).float().unsqueeze(1)


def decode(latents: Tensor) -> np.ndarray:
    """Decodes latents (16, 1, h, w), any float dtype and device, to a uint8 picture (8h, 8w, 3), clipped to its range."""
    if latents.ndim != 4 or latents.shape[:2] != (CHANNELS, 1):
        raise ValueError(f"latents must be ({CHANNELS}, 1, h, w), got {tuple(latents.shape)}")
    rows, columns = latents.shape[2:]
    blocks = np.zeros((3, rows, PATCH, columns, PATCH))
    blocks[AXES, :, ROWS, :, COLUMNS] = latents[:, 0].detach().double().cpu().numpy() * CHANNEL_SCALE + CHANNEL_MEAN
    height, width = rows * PATCH, columns * PATCH
    colours = analysis_matrix(height).T @ blocks.reshape(3, height, width) @ analysis_matrix(width)
    rgb = np.moveaxis(colours, 0, 2) @ COLOUR_AXES
    picture: np.ndarray = ((rgb.clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    return picture
