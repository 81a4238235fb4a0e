"""The options of the masked loss: one frozen, validated object that every backend reads.

The stages of the loss, in order, with the field that sets each; docs/formula.md has the formulas whole:

    0  read             m = mask / 255, or clamped to [0, 1]
    1  resample         m to the (F, H, W) of the loss; then snap  resample
       binarize         m = [m > threshold]                        binarize
    2  invert           m = 1 - m, the raw mask                    invert
    3  blur             Gaussian over H and W; then snap to 0, 1   blur_kernel_size
    4  gamma            w = m ** gamma                             gamma
    5  floor            w = w (1 - u) + u, or max(w, u)            min_weight, floor
    6  prior region     v = 1 - w, or [raw < threshold]; snap      prior_threshold
    7  mask gate        w = 1, v = 0 where a sample is off
    8  error            e = rho(pred - target)                     loss_type, loss_delta
    9  reduce           sum(w e) / sum(w), + prior_weight times    normalization, per_sample, prior_weight, area_scale_beta, eps
                        the same of v and the prior
"""

from __future__ import annotations

import dataclasses
import json
import math
import numbers
from collections.abc import Sequence
from typing import Any, Literal, get_args

ResampleMode = Literal["area", "bilinear", "nearest", "nearest-exact", "bicubic"]
Floor = Literal["affine", "clamp"]
Normalization = Literal["weighted_mean", "mean_one", "mean"]
LossType = Literal["mse", "huber", "smooth_l1", "l1", "pseudo_huber"]
Preset = Literal["sd-scripts", "simpletuner", "ai-toolkit", "onetrainer", "diffusion-pipe", "blissful"]

RESAMPLE_MODES: tuple[str, ...] = get_args(ResampleMode)
FLOORS: tuple[str, ...] = get_args(Floor)
NORMALIZATIONS: tuple[str, ...] = get_args(Normalization)
LOSS_TYPES: tuple[str, ...] = get_args(LossType)
PRESETS: tuple[str, ...] = get_args(Preset)
LARGEST_BLUR = 1023  # no latents are larger, and the work grows with it


def _number(field: str, value: Any, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{field} must be a number {expected}, got {value!r} ({type(value).__name__})")
    if not -math.inf < float(value) < math.inf:  # not math.isfinite: torch.compile may trace a number that changes
        raise ValueError(f"{field} must be a finite number {expected}, got {value!r}")
    return float(value)


def _choice(field: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _flag(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{field} must be True or False, got {value!r} ({type(value).__name__})")


def checked_prior_weight(value: Any, per_sample: bool) -> float | tuple[float, ...]:
    """A prior weight as a float or a tuple of floats, one per sample; raises as `MaskedLossConfig` says."""
    several = isinstance(value, Sequence) and not isinstance(value, str)
    expected = ">= 0" if several else ">= 0, or a sequence of them"
    weights = tuple(_number("prior_weight", item, expected) for item in (value if several else (value,)))
    if not weights or min(weights) < 0:
        raise ValueError(f"prior_weight must be >= 0, got {value!r}")
    if several and not per_sample:
        raise ValueError(
            f"prior_weight has one value per sample ({len(weights)}), which needs per_sample=True: "
            "set per_sample=True or give one number"
        )
    return weights if several else weights[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLossConfig:
    """How a mask becomes weights, and how weighted errors become one number.

    The fields are listed in the order in which the loss applies them.

    Args:
        resample: how the mask is brought to the size of the loss: "area" (adaptive average), "bilinear", "nearest",
            "nearest-exact" or "bicubic" (clamped to [0, 1]), as `torch.nn.functional.interpolate` defines them, without
            antialiasing. Frames: as they are, one mask repeated over all frames, or averaged by area.
        binarize: None, or a threshold in [0, 1): the mask becomes 1 where it is above the threshold and 0 elsewhere.
        invert: weight what the mask leaves out.
        blur_kernel_size: 0 (off) or the odd width, in loss positions, of a Gaussian over height and width; at most 1023.
        gamma: the mask is raised to this power, > 0. Below 1 lifts grey values, above 1 lowers them.
        min_weight: floor of the weights, in [0, 1).
        floor: "affine": m (1 - u) + u; "clamp": max(m, u).
        prior_threshold: None: the prior covers 1 - w. A threshold in [0, 1]: the prior covers the positions whose
            (inverted, not blurred) mask is below it, and the target gives them up. Without a prior it does nothing.
        prior_weight: factor of the prior term, >= 0; one number, or one per sample with `per_sample`.
        loss_type: "mse", "huber", "smooth_l1" or "l1", as torch defines them, or "pseudo_huber",
            delta^2 (sqrt(1 + (d / delta)^2) - 1) (Charbonnier et al. 1997); sd-scripts calls twice this loss `huber`.
        loss_delta: `delta` of huber and pseudo_huber, `beta` of smooth_l1; > 0.
        normalization: "weighted_mean" sum(w e) / (sum(w) + eps); "mean_one" mean(w / (mean(w) + eps) e), the same
            number up to eps; "mean" mean(w e).
        per_sample: normalise within each sample, then average over samples. A sample without weight contributes 0.
        area_scale_beta: the target term is multiplied by (mean of the mask, inverted, not blurred) ** beta; >= 0.
        eps: added to denominators, > 0.

    Raises:
        ValueError, TypeError: when the config is built, naming the field, the value and what is accepted.
    """

    resample: ResampleMode = "area"
    binarize: float | None = None
    invert: bool = False
    blur_kernel_size: int = 0
    gamma: float = 1.0
    min_weight: float = 0.0
    floor: Floor = "affine"
    prior_threshold: float | None = None
    prior_weight: float | tuple[float, ...] = 0.5
    loss_type: LossType = "mse"
    loss_delta: float = 1.0
    normalization: Normalization = "weighted_mean"
    per_sample: bool = False
    area_scale_beta: float = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _choice("resample", self.resample, RESAMPLE_MODES)
        _choice("floor", self.floor, FLOORS)
        _choice("loss_type", self.loss_type, LOSS_TYPES)
        _choice("normalization", self.normalization, NORMALIZATIONS)
        _flag("invert", self.invert)
        _flag("per_sample", self.per_sample)
        self._bounded("binarize", "in [0, 1), or None", lambda x: 0 <= x < 1, optional=True)
        self._bounded("gamma", "> 0", lambda x: x > 0)
        self._bounded("min_weight", "in [0, 1)", lambda x: 0 <= x < 1)
        self._bounded("prior_threshold", "in [0, 1], or None", lambda x: 0 <= x <= 1, optional=True)
        self._bounded("loss_delta", "> 0", lambda x: x > 0)
        self._bounded("area_scale_beta", ">= 0", lambda x: x >= 0)
        self._bounded("eps", "> 0", lambda x: x > 0)
        self._check_blur()
        object.__setattr__(self, "prior_weight", checked_prior_weight(self.prior_weight, self.per_sample))
        # Made here and not when asked: torch.compile cannot trace json, and operators take a config as text.
        object.__setattr__(self, "_text", json.dumps(self.to_dict()))

    def _bounded(self, field: str, expected: str, accepts: Any, optional: bool = False) -> None:
        value = getattr(self, field)
        if value is None and optional:
            return
        number = _number(field, value, expected)
        if not accepts(number):
            raise ValueError(f"{field} must be {expected}, got {value!r}")
        object.__setattr__(self, field, number)

    def _check_blur(self) -> None:
        size = self.blur_kernel_size
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"blur_kernel_size must be 0 or an odd integer, got {size!r} ({type(size).__name__})")
        if not 0 <= size <= LARGEST_BLUR or (size > 0 and size % 2 == 0):
            raise ValueError(
                f"blur_kernel_size must be 0 (off) or an odd integer from 1 to {LARGEST_BLUR}, got {size!r}"
            )

    def replace(self, **changes: Any) -> MaskedLossConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, in order: for JSON, metadata and logs. `MaskedLossConfig(**d)` reads it back."""
        return dataclasses.asdict(self)

    def to_text(self) -> str:
        """The fields as JSON."""
        return self._text  # type: ignore[attr-defined]

    @classmethod
    def preset(cls, name: Preset, **changes: Any) -> MaskedLossConfig:
        """The masked loss of another trainer, as a config; keyword arguments change single fields.

        Each reproduces the loss that the trainer computes from its mask. None reproduces a trainer's faults, its dtype
        (everything here is float32) or what it does to the mask file before the loss.

        - "sd-scripts": area, plain mean: the loss shrinks with the masked area. Not reproduced: per-image `loss_weights`
          and the min-SNR factor (pass them as `weighting`).
        - "simpletuner": its `mask` conditioning type: area, plain mean. For the `segmentation` type add `binarize=0.0`, which
          grows the mask by up to a whole latent cell, as it does there; its probability is `mask_gate`. Not reproduced:
          its video masks, which fail there.
        - "ai-toolkit": nearest, divided by the mean of the whole batch. Its `mask_min_value` is `min_weight`; its inverted
          prior is `prior` with weight 0.5. Not reproduced: bfloat16 weights, the bicubic prior mask that leaves [0, 1] and
          takes sample 0 for the whole batch, NaN for an empty mask, zeros for a missing mask, random blur while loading.
        - "onetrainer": bilinear (not antialiased here), `max(m, 0.1)`, plain mean; set `per_sample=True,
          normalization="mean_one"` for its normalize_masked_area_loss. Its masked_prior_preservation_weight is
          `prior_weight`, 0 by default. Not reproduced: per-column normalisation of 5-D masks, NaN for full masks.
        - "diffusion-pipe": nearest-exact, plain mean. Not reproduced: fp16 masks; its LTX variant (use "mean_one").
        - "blissful": area, affine floor after gamma, weighted mean over the batch: the defaults of this class. Not
          reproduced: `--mask_loss_scale`, which cancels out there.

        Raises:
            ValueError: for a name that is not a preset, listing those that are.
        """
        _choice("preset", name, PRESETS)
        fields: dict[str, dict[str, Any]] = {
            "sd-scripts": dict(normalization="mean"),
            "simpletuner": dict(normalization="mean"),
            "ai-toolkit": dict(resample="nearest", normalization="mean_one"),
            "onetrainer": dict(
                resample="bilinear", normalization="mean", floor="clamp", min_weight=0.1, prior_weight=0.0
            ),
            "diffusion-pipe": dict(resample="nearest-exact", normalization="mean"),
            "blissful": dict(),
        }
        return cls(**{**fields[name], **changes})
