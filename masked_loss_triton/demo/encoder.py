"""A fixed linear picture encoder that stands in for a video VAE: no VAE weights can be shipped with this package.

Each 8x8 patch of RGB becomes 16 numbers, the size and channel count of HunyuanVideo, WAN and Qwen-Image latents: the 10
lowest frequencies of a 2-D DCT of its brightness and the 3 lowest of each of two colour differences. The basis is
orthonormal, so its transpose decodes, and the decoded patch is the closest one these 16 numbers can describe. As in WAN's
VAE, the channels are then shifted and scaled by constants, here `CHANNEL_MEAN` and `CHANNEL_SCALE`, to a variance near 1.
What the demo shows about masks does not depend on the encoder; how sharp its pictures look does.
"""

from __future__ import annotations

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


FREQUENCIES = _frequencies()


def _basis() -> Tensor:
    """(16, 192) float32 with orthonormal rows; columns are a patch's values in the order colour, row, column."""
    position = (np.arange(PATCH) + 0.5) * math.pi / PATCH
    cosines = np.stack([np.cos(k * position) for k in range(PATCH)])
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    rows = [np.einsum("c,i,j->cij", COLOUR_AXES[a], cosines[u], cosines[v]).ravel() for a, u, v in FREQUENCIES]
    return torch.from_numpy(np.stack(rows)).float()


BASIS = _basis()
# From the photographs the demo ships with, RGB in [-1, 1]: each channel's mean, and the square root of its standard
# deviation, rounded. Over all channels the variance is then about 1. Dividing by the whole deviation makes faint detail as
# loud as the large shapes, and a model this small then learns neither; dividing by nothing drowns the detail altogether.
_MEAN = [-2.5, *[0.0] * 9, 1.5, 0.0, 0.0, 0.3, 0.0, 0.0]
_SCALE = [2.5, 1.1, 1.1, 0.8, 0.8, 0.8, 0.6, 0.6, 0.6, 0.6, 1.7, 0.6, 0.6, 1.0, 0.4, 0.4]
CHANNEL_MEAN = torch.tensor(_MEAN).view(CHANNELS, 1, 1, 1)
CHANNEL_SCALE = torch.tensor(_SCALE).view(CHANNELS, 1, 1, 1)


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
    picture = torch.from_numpy(rgb.astype(np.float32) / 127.5 - 1)
    patches = picture.view(height // PATCH, PATCH, width // PATCH, PATCH, 3).permute(0, 2, 4, 1, 3)
    coefficients = patches.reshape(height // PATCH, width // PATCH, -1) @ BASIS.T
    return ((coefficients.permute(2, 0, 1).unsqueeze(1) - CHANNEL_MEAN) / CHANNEL_SCALE).contiguous()


def decode(latents: Tensor) -> np.ndarray:
    """Decodes latents (16, 1, h, w), any float dtype and device, to a uint8 picture (8h, 8w, 3), clipped to its range."""
    if latents.ndim != 4 or latents.shape[:2] != (CHANNELS, 1):
        raise ValueError(f"latents must be ({CHANNELS}, 1, h, w), got {tuple(latents.shape)}")
    coefficients = latents.detach().float().cpu() * CHANNEL_SCALE + CHANNEL_MEAN
    height, width = latents.shape[2:]
    patches = (coefficients[:, 0].permute(1, 2, 0) @ BASIS).view(height, width, 3, PATCH, PATCH)
    picture = patches.permute(0, 3, 1, 4, 2).reshape(height * PATCH, width * PATCH, 3)
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
