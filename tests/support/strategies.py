"""What hypothesis draws: configurations, shapes, memory layouts, dtypes, masks and the rest of a call."""

from __future__ import annotations

import hypothesis.strategies as st
import torch

from masked_loss_triton import FlowTarget, MaskedLossConfig
from masked_loss_triton.config import FLOORS, LOSS_TYPES, NORMALIZATIONS, RESAMPLE_MODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASK_KINDS = ("soft", "binary", "empty", "full", "one_empty_sample")


@st.composite
def configs(draw) -> MaskedLossConfig:
    per_sample = draw(st.booleans())
    return MaskedLossConfig(
        resample=draw(st.sampled_from(RESAMPLE_MODES)),
        binarize=draw(st.sampled_from([None, None, 0.0, 0.31])),
        invert=draw(st.booleans()),
        blur_kernel_size=draw(st.sampled_from([0, 0, 1, 3, 5])),
        gamma=draw(st.sampled_from([1.0, 1.0, 0.7, 2.0])),
        min_weight=draw(st.sampled_from([0.0, 0.0, 0.05, 0.4])),
        floor=draw(st.sampled_from(FLOORS)),
        prior_threshold=draw(st.sampled_from([None, None, 0.43])),
        prior_weight=draw(st.sampled_from([0.0, 0.5, 2.0])),
        loss_type=draw(st.sampled_from(LOSS_TYPES)),
        loss_delta=draw(st.sampled_from([1.0, 0.3])),
        normalization=draw(st.sampled_from(NORMALIZATIONS)),
        per_sample=per_sample,
        area_scale_beta=draw(st.sampled_from([0.0, 0.0, 0.5])),
    )


def laid_out(values: torch.Tensor, how: str) -> torch.Tensor:
    """The same numbers with other strides."""
    if how == "permuted":  # channels innermost
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "sliced":
        padded = torch.full([*values.shape[:-1], values.shape[-1] + 3], float("nan"), dtype=values.dtype)
        padded[..., 1:-2] = values
        return padded[..., 1:-2]
    if how == "strided":
        wide = torch.full([size * 2 for size in values.shape], float("nan"), dtype=values.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in values.shape)]
        view.copy_(values)
        return view
    if how == "expanded":
        return values[:1].expand_as(values)
    return values.contiguous()


LAYOUTS = ("contiguous", "contiguous", "permuted", "sliced", "strided", "expanded")


def random_mask(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    soft = torch.rand(shape, generator=generator)
    if kind == "soft":
        return soft
    mask = (soft > 0.5).float()
    if kind == "empty":
        mask.zero_()
    elif kind == "full":
        mask.fill_(1)
    elif kind == "one_empty_sample":
        mask[0] = 0
    return mask


@st.composite
def calls(draw, dtypes=DTYPES, with_prior=None):
    """(pred, target, mask, config, keyword arguments) of one call of the loss."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def normal(shape):
        return torch.randn(shape, generator=generator)

    config = draw(configs())
    layout = draw(st.sampled_from(["video", "video", "image", "layered", "packed"]))
    batch, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 4, 16]))
    frames = 1 if layout in ("image", "packed") else draw(st.sampled_from([1, 2, 3, 5]))
    height, width = draw(st.sampled_from([(1, 1), (3, 5), (4, 4), (6, 10), (7, 9), (13, 17)]))
    if layout == "packed":
        height, width = draw(st.sampled_from([(2, 2), (4, 6), (6, 10)]))
    shape = {
        "packed": (batch, height * width // 4, 4 * channels),
        "video": (batch, channels, frames, height, width),
        "image": (batch, channels, height, width),
        "layered": (batch, frames, channels, height, width),
    }[layout]

    def elements(dtype):
        return laid_out(normal(shape).to(dtype), draw(st.sampled_from(LAYOUTS)))

    pred, target = elements(draw(st.sampled_from(dtypes))), elements(draw(st.sampled_from(dtypes)))
    if draw(st.integers(0, 3)) == 0:
        target = FlowTarget(target, elements(draw(st.sampled_from(dtypes))), draw(st.sampled_from([1, -1])))

    mask_batch = draw(st.sampled_from([1, batch]))
    if layout in ("image", "packed"):
        mask_frames = 1
    elif layout == "layered":
        mask_frames = draw(st.sampled_from([1, frames]))
    else:
        mask_frames = draw(st.sampled_from([1, frames, 4 * frames - 3, 2]))
    scale = draw(st.sampled_from(["grid", "grid", "pixels", "tokens", "odd"]))
    pixels = 8 if height * width < 40 else 2  # the interpreter takes a second for 8 x 8 on a larger grid
    size = {
        "grid": (height, width),
        "pixels": (pixels * height, pixels * width),
        "tokens": ((height + 1) // 2, (width + 1) // 2),
        "odd": (height + 3, 2 * width + 1),
    }[scale]
    mask = random_mask(draw(st.sampled_from(MASK_KINDS)), (mask_batch, mask_frames, *size), generator)
    mask_dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float16, torch.uint8, torch.bool]))
    if mask_dtype == torch.uint8:
        mask = (mask * 255).round()
    mask = (mask > 0.5) if mask_dtype == torch.bool else mask.to(mask_dtype)
    mask = draw(st.sampled_from([mask, mask.unsqueeze(1), mask[:, 0] if mask_frames == 1 else mask]))
    if draw(st.integers(0, 9)) == 0:
        mask = None

    call = {}
    if layout == "layered":
        call["layout"] = "layered"
    if layout == "packed":
        call |= {"layout": "packed", "patches": (height // 2, width // 2)}
    if draw(st.booleans()) if with_prior is None else with_prior:
        call["prior"] = elements(draw(st.sampled_from(dtypes)))
        call["prior_gate"] = draw(
            st.sampled_from(
                [None, torch.rand(batch, generator=generator), torch.rand(batch, generator=generator) > 0.5]
            )
        )
        if config.per_sample and draw(st.booleans()):
            call["prior_weight"] = torch.rand(batch, generator=generator)
    call["mask_gate"] = draw(st.sampled_from([None, None, torch.rand(batch, generator=generator) > 0.5]))
    call["loss_delta"] = draw(st.sampled_from([None, None, 0.2 + torch.rand(batch, generator=generator)]))
    call["weighting"] = draw(st.sampled_from([None, torch.rand((batch, 1, 1, 1, 1), generator=generator)]))
    return pred, target, mask, config, call


def on(device: str, value):
    """The same value on a device, with the same strides."""
    if isinstance(value, FlowTarget):
        return FlowTarget(on(device, value.noise), on(device, value.latents), value.sign)
    if isinstance(value, tuple):
        return tuple(on(device, item) for item in value)
    if isinstance(value, torch.Tensor) and device != "cpu":
        moved = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        return value.to(device) if 0 in value.stride() else moved.copy_(value)
    return value
