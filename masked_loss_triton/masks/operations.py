"""Pixel operations on masks, before they are brought to latent size: dilate, then blur.

Inversion, gamma and floor are left to training time, where changing them costs no second caching. They can be baked in at
latent size for trainers that have no such option; inversion also for data where some items have no mask: their full weight
would be inverted with the rest at training time, to nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

MAX_BLUR = 0.05  # of the smaller side


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskOperations:
    """What is done to every mask of a dataset.

    Args:
        mask_dilate: grow the mask by so many pixels of the picture, in every direction; negative shrinks it.
        mask_blur: Gaussian blur; its standard deviation as a fraction, 0 to 0.05, of the picture's smaller side.
        mask_blur_random: draw the fraction of each item between 0 and `mask_blur`, from the seed and the item's name.
        mask_seed: seed of that draw.
        mask_time: "mean" or "max" over the frames of one latent frame.
        mask_bake_invert: 1 - m in the cache, for items that have a mask.
        mask_bake_gamma: the weights are raised to this power in the cache; 1 leaves gamma to training time.
        mask_bake_min_weight: floor m (1 - u) + u in the cache, after gamma; 0 leaves it to training time.

    Raises:
        ValueError: naming the field, the value and what is accepted.
    """

    mask_dilate: int = 0
    mask_blur: float = 0.0
    mask_blur_random: bool = False
    mask_seed: int = 0
    mask_time: str = "mean"
    mask_bake_invert: bool = False
    mask_bake_gamma: float = 1.0
    mask_bake_min_weight: float = 0.0

    def __post_init__(self) -> None:
        for field, low, high in (
            ("mask_dilate", -1024, 1024),
            ("mask_seed", 0, 2**63),
            ("mask_blur", 0, MAX_BLUR),
            ("mask_bake_gamma", 1e-3, 1e3),
            ("mask_bake_min_weight", 0, 1 - 1e-6),
        ):
            value = getattr(self, field)
            kinds = (int,) if field in ("mask_dilate", "mask_seed") else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                kind = "a whole number" if kinds == (int,) else "a number"
                raise ValueError(f"{field} must be {kind} between {low:g} and {high:g}, got {value!r}")
        for field in ("mask_blur_random", "mask_bake_invert"):
            if not isinstance(getattr(self, field), bool):
                raise ValueError(f"{field} must be true or false, got {getattr(self, field)!r}")
        if self.mask_time not in ("mean", "max"):
            raise ValueError(f"mask_time must be 'mean' or 'max', got {self.mask_time!r}")

    def __str__(self) -> str:
        """Names the operations that change something, with their values."""
        fields = ((field.name, field.default) for field in dataclasses.fields(self))
        changed = [f"{name} {getattr(self, name)}" for name, default in fields if getattr(self, name) != default]
        return ", ".join(changed) or "no operations"

    def blur_fraction(self, item_name: str) -> float:
        """The blur of one item; the same for the same seed and name on every machine and in every order."""
        if not self.mask_blur_random:
            return self.mask_blur
        digest = hashlib.sha256(f"{self.mask_seed}:{item_name}".encode("utf-8", "surrogateescape")).digest()
        return self.mask_blur * int.from_bytes(digest[:8], "big") / 2**64

    def apply(self, mask: np.ndarray, item_name: str) -> np.ndarray:
        """Dilates and blurs one mask in the pixels of the picture.

        Args:
            mask: (H, W) uint8. Not modified.
            item_name: the picture's or clip's file name without folder; only read when `mask_blur_random`.

        Returns:
            (H, W) uint8.
        """
        return blur(dilate(mask, self.mask_dilate), self.blur_fraction(item_name))

    def bake(self, weights: np.ndarray) -> np.ndarray:
        """Inversion, gamma and floor on weights in [0, 1] at latent size: the order in which the loss applies them."""
        if self.mask_bake_invert:
            weights = 1 - weights
        if self.mask_bake_gamma != 1:
            weights = weights ** np.float32(self.mask_bake_gamma)
        u = np.float32(self.mask_bake_min_weight)
        return weights * (1 - u) + u if u else weights


def dilate(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Grows (or, negative, shrinks) the bright parts of an (H, W) uint8 mask by a disc of radius `pixels`."""
    if pixels == 0:
        return mask
    import cv2

    radius = abs(pixels)
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disc = (x * x + y * y <= radius * radius).astype(np.uint8)
    # OpenCV's default border never wins, so that a mask that touches the frame does not shrink from it.
    return (cv2.dilate if pixels > 0 else cv2.erode)(mask, disc)


def blur(mask: np.ndarray, fraction: float) -> np.ndarray:
    """Gaussian blur of an (H, W) uint8 mask, standard deviation `fraction` of its smaller side, edges replicated."""
    sigma = fraction * min(mask.shape)
    if sigma <= 0:
        return mask
    import cv2

    return cv2.GaussianBlur(mask, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
