"""From the mask to the sums of the weights, and to weight tensors where they are needed.

    sum(w), sum(v), sum(m)  over the positions of each sample        the stages of w and v: stages.py

`resample_kernel` writes the raw mask, needed only under a blur, which looks at neighbours. `weights_kernel` makes the sums, and
writes the weights where the loss kernel cannot make them again in registers from a mask on its own grid.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl

from masked_loss_triton.kernels.reduction import (
    MIN_RAW,
    PLANES,
    PLANES_WITH_STATS,
    SUM_OVERLAP,
    SUM_RAW,
    SUM_V,
    SUM_W,
    smaller,
)
from masked_loss_triton.kernels.stages import (
    COMPLEMENT,
    NO_PRIOR,
    THRESHOLD,
    binarized_and_inverted,
    gaussian_tap,
    on_grid_or_resampled,
    resampled,
    sample_gates,
    split_position,
    target_and_prior_weight,
)
from masked_loss_triton.kernels.strides import common_divisor, position_stride


@triton.jit
def resample_kernel(
    mask_ptr,
    raw_ptr,  # (B or 1, F, H, W) float32, contiguous
    binarize,
    frames,
    height,
    width,
    mask_frames,
    mask_height,
    mask_width,
    mask_stride_b,
    mask_stride_f,
    mask_stride_h,
    mask_stride_w,
    taps_f,
    taps_h,
    taps_w,
    scale_h,
    scale_w,
    RESAMPLE: tl.constexpr,
    IS_UINT8: tl.constexpr,
    HAS_BINARIZE: tl.constexpr,
    INVERT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the raw mask, grid (tiles, B or 1)."""
    b = tl.program_id(1).to(tl.int64)
    positions = frames * height * width
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = position < positions
    frame, row, column = split_position(position, height, width)
    m = resampled(
        mask_ptr + b * mask_stride_b,
        frame,
        row,
        column,
        valid,
        frames,
        height,
        width,
        mask_frames,
        mask_height,
        mask_width,
        mask_stride_f,
        mask_stride_h,
        mask_stride_w,
        taps_f,
        taps_h,
        taps_w,
        scale_h,
        scale_w,
        RESAMPLE,
        IS_UINT8,
    )
    m = binarized_and_inverted(m, binarize, HAS_BINARIZE, INVERT)
    tl.store(raw_ptr + b * positions + position, m, mask=valid)


@triton.jit
def weights_kernel(
    mask_ptr,  # the mask, or under a blur the raw mask
    prior_gate_ptr,  # (B,)
    mask_gate_ptr,  # (B,) uint8
    w_ptr,  # (B, F, H, W) float32, contiguous
    v_ptr,  # (B, F, H, W) float32, contiguous
    partials_ptr,  # (PLANES, B, TILES) float32
    ticket_ptr,  # int32, set to 0 for the loss kernel that follows
    binarize,
    blur_exponent,
    blur_norm,
    gamma,
    min_weight,
    prior_threshold,
    frames,
    height,
    width,
    mask_frames,
    mask_height,
    mask_width,
    mask_stride_b,
    mask_stride_f,
    mask_stride_h,
    mask_stride_w,
    taps_f,
    taps_h,
    taps_w,
    scale_h,
    scale_w,
    blocks_per_tile,
    HAS_MASK: tl.constexpr,
    RESAMPLE: tl.constexpr,
    IS_UINT8: tl.constexpr,
    HAS_BINARIZE: tl.constexpr,
    INVERT: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,
    HAS_GAMMA: tl.constexpr,
    CLAMP_FLOOR: tl.constexpr,
    PRIOR_REGION: tl.constexpr,
    HAS_PRIOR_GATE: tl.constexpr,
    HAS_MASK_GATE: tl.constexpr,
    WRITE_W: tl.constexpr,
    WRITE_V: tl.constexpr,
    STATS: tl.constexpr,
    FLAT: tl.constexpr,
    DIVISOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the weights if asked, and the partial sums of each tile; grid (tiles, B).

    Sums over tiles are left to whoever reads them: a few dozen numbers, added in a fixed order, without atomics.
    """
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    if (tile == 0) & (b == 0):
        tl.store(ticket_ptr, 0)
    # Divided and multiplied back: the compiler then knows what divides it, and a mask in one run is read 128 bits at a time.
    positions = frames * height * width // DIVISOR * DIVISOR
    prior_gate, mask_gate = sample_gates(prior_gate_ptr, mask_gate_ptr, b, HAS_PRIOR_GATE, HAS_MASK_GATE)

    sum_w = tl.zeros((BLOCK,), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    sum_raw = tl.zeros((BLOCK,), tl.float32)
    if STATS:
        sum_overlap = tl.zeros((BLOCK,), tl.float32)
        min_raw = tl.full((BLOCK,), float("inf"), tl.float32)
        max_raw = tl.full((BLOCK,), -float("inf"), tl.float32)
        min_w = tl.full((BLOCK,), float("inf"), tl.float32)
        max_w = tl.full((BLOCK,), -float("inf"), tl.float32)
        min_v = tl.full((BLOCK,), float("inf"), tl.float32)
        max_v = tl.full((BLOCK,), -float("inf"), tl.float32)

    for step in range(blocks_per_tile):
        position = (tile * blocks_per_tile + step) * BLOCK + tl.arange(0, BLOCK)
        valid = position < positions
        frame, row, column = split_position(position, height, width)
        if HAS_MASK:
            if KERNEL_SIZE > 1:
                sample_ptr = mask_ptr + b * (mask_stride_b * DIVISOR)
                raw = tl.load(sample_ptr + position, mask=valid, other=0.0)
                blurred = tl.zeros((BLOCK,), tl.float32)
                for kh in range(KERNEL_SIZE):
                    tap_row = tl.minimum(tl.maximum(row + kh - KERNEL_SIZE // 2, 0), height - 1)
                    of_row = tl.zeros((BLOCK,), tl.float32)
                    for kw in range(KERNEL_SIZE):
                        tap_column = tl.minimum(tl.maximum(column + kw - KERNEL_SIZE // 2, 0), width - 1)
                        neighbour = (frame * height + tap_row) * width + tap_column
                        value = tl.load(sample_ptr + neighbour, mask=valid, other=0.0)
                        of_row += gaussian_tap(kw - KERNEL_SIZE // 2, blur_exponent, blur_norm) * value
                    blurred += gaussian_tap(kh - KERNEL_SIZE // 2, blur_exponent, blur_norm) * of_row
            else:
                raw = on_grid_or_resampled(
                    mask_ptr + b * (mask_stride_b * DIVISOR),
                    position,
                    frame,
                    row,
                    column,
                    valid,
                    frames,
                    height,
                    width,
                    mask_frames,
                    mask_height,
                    mask_width,
                    mask_stride_f,
                    mask_stride_h,
                    mask_stride_w,
                    taps_f,
                    taps_h,
                    taps_w,
                    scale_h,
                    scale_w,
                    RESAMPLE,
                    IS_UINT8,
                    FLAT,
                )
                raw = binarized_and_inverted(raw, binarize, HAS_BINARIZE, INVERT)
                blurred = raw
        else:
            raw = tl.full((BLOCK,), 1.0, tl.float32)
            blurred = raw
        w, v = target_and_prior_weight(
            raw,
            blurred,
            prior_gate,
            mask_gate,
            gamma,
            min_weight,
            prior_threshold,
            HAS_GAMMA,
            CLAMP_FLOOR,
            PRIOR_REGION,
            HAS_MASK_GATE,
        )
        if HAS_MASK_GATE:
            raw = tl.where(mask_gate, raw, 1.0)
        if WRITE_W:
            tl.store(w_ptr + b * positions + position, w, mask=valid)
        if WRITE_V:
            tl.store(v_ptr + b * positions + position, v, mask=valid)
        sum_w += tl.where(valid, w, 0.0)
        sum_v += tl.where(valid, v, 0.0)
        sum_raw += tl.where(valid, raw, 0.0)
        if STATS:
            sum_overlap += tl.where(valid, tl.where(w < v, w, v), 0.0)
            min_raw = smaller(min_raw, tl.where(valid, raw, float("inf")))
            max_raw = -smaller(-max_raw, tl.where(valid, -raw, float("inf")))
            min_w = smaller(min_w, tl.where(valid, w, float("inf")))
            max_w = -smaller(-max_w, tl.where(valid, -w, float("inf")))
            min_v = smaller(min_v, tl.where(valid, v, float("inf")))
            max_v = -smaller(-max_v, tl.where(valid, -v, float("inf")))

    tiles = tl.num_programs(0)
    plane = tl.num_programs(1) * tiles
    partial_ptr = partials_ptr + b * tiles + tile
    tl.store(partial_ptr + SUM_W * plane, tl.sum(sum_w, axis=0))
    tl.store(partial_ptr + SUM_V * plane, tl.sum(sum_v, axis=0))
    tl.store(partial_ptr + SUM_RAW * plane, tl.sum(sum_raw, axis=0))
    if STATS:
        tl.store(partial_ptr + SUM_OVERLAP * plane, tl.sum(sum_overlap, axis=0))
        tl.store(partial_ptr + MIN_RAW * plane, tl.reduce(min_raw, 0, smaller))
        tl.store(partial_ptr + (MIN_RAW + 1) * plane, -tl.reduce(-max_raw, 0, smaller))
        tl.store(partial_ptr + (MIN_RAW + 2) * plane, tl.reduce(min_w, 0, smaller))
        tl.store(partial_ptr + (MIN_RAW + 3) * plane, -tl.reduce(-max_w, 0, smaller))
        tl.store(partial_ptr + (MIN_RAW + 4) * plane, tl.reduce(min_v, 0, smaller))
        tl.store(partial_ptr + (MIN_RAW + 5) * plane, -tl.reduce(-max_v, 0, smaller))


@dataclasses.dataclass(frozen=True)
class WeightsLaunch:
    """Launch configuration of the weights kernel.

    block: 512 positions on 4 warps: four per thread, so that a float32 mask on the grid is read 128 bits at a time.
    tiles: programs per sample. Every program of the loss kernel reads all partial sums, so there are at most 64 of them: 256 bytes
        beside the 100 KB that it reads of everything else, and still enough programs for a mask of 1/16 of pred's bytes.
    registers, resample_registers: what a thread of this kernel, and of the resampling one before a blur, may use at most: 4 and 8
        programs are resident on every NVIDIA multiprocessor. Both read a mask, a sixteenth of pred.
    """

    block: int
    tiles: int
    blocks_per_tile: int
    num_warps: int
    registers: ClassVar[int] = 128
    resample_registers: ClassVar[int] = 64

    @classmethod
    def choose(cls, positions: int, batch: int) -> WeightsLaunch:
        block = 512
        blocks = triton.cdiv(positions, block)
        tiles = min(blocks, max(1, 64 // batch))
        blocks_per_tile = triton.cdiv(blocks, tiles)
        return cls(block, triton.cdiv(blocks, blocks_per_tile), blocks_per_tile, 4)


@dataclasses.dataclass(frozen=True)
class MaskWeights:
    """What the loss kernel needs of the mask: partial sums, and either weight tensors or the mask itself."""

    partials: torch.Tensor  # (PLANES or PLANES_WITH_STATS, B, tiles) float32
    ticket: torch.Tensor  # () int32, 0 once the weights kernel ran
    w: torch.Tensor | None  # (B, F, H, W) float32; None: the loss kernel makes it from the mask
    v: torch.Tensor | None


def on_grid(mask: torch.Tensor | None, grid: tuple[int, int, int], config: Any) -> bool:
    """True when each position's weight depends on one mask value only, so that no weight tensor needs to exist."""
    if mask is None:
        return True
    _, frames, height, width = mask.shape
    return (height, width) == grid[1:] and frames in (1, grid[0]) and config.blur_kernel_size <= 1


def stage_arguments(config: Any, has_prior: bool, prior_gate: Any, mask_gate: Any) -> dict[str, Any]:
    """The arguments of stages 1 to 7 that the weights kernel and the loss kernel share."""
    if not has_prior:
        region = NO_PRIOR.value
    elif config.prior_threshold is None:
        region = COMPLEMENT.value
    else:
        region = THRESHOLD.value
    return dict(
        prior_gate_ptr=prior_gate,
        mask_gate_ptr=mask_gate,
        binarize=0.0 if config.binarize is None else config.binarize,
        gamma=config.gamma,
        min_weight=config.min_weight,
        prior_threshold=config.prior_threshold or 0.0,
        HAS_BINARIZE=config.binarize is not None,
        INVERT=config.invert,
        HAS_GAMMA=config.gamma != 1,
        CLAMP_FLOOR=config.floor == "clamp",
        PRIOR_REGION=region,
        HAS_PRIOR_GATE=prior_gate is not None,
        HAS_MASK_GATE=mask_gate is not None,
    )


def _resample_arguments(mask: torch.Tensor | None, grid: tuple[int, int, int], mode: str) -> dict[str, Any]:
    if mask is None:
        names = "mask_frames mask_height mask_width mask_stride_b mask_stride_f mask_stride_h mask_stride_w taps_f taps_h taps_w"
        return dict.fromkeys(names.split(), 1) | dict(scale_h=1.0, scale_w=1.0, RESAMPLE="area", IS_UINT8=False)
    frames, height, width = grid
    _, mask_frames, mask_height, mask_width = mask.shape
    if (mask_height, mask_width) == (height, width):
        mode = "area"  # a window of one: the value itself, also beside a NaN
    spatial = {"area": None, "nearest": 1, "nearest-exact": 1, "bilinear": 2, "bicubic": 4}[mode]
    return dict(
        mask_frames=mask_frames,
        mask_height=mask_height,
        mask_width=mask_width,
        mask_stride_b=0 if mask.shape[0] == 1 else mask.stride(0),
        mask_stride_f=mask.stride(1),
        mask_stride_h=mask.stride(2),
        mask_stride_w=mask.stride(3),
        taps_f=_most_taps(mask_frames, frames),
        taps_h=spatial or _most_taps(mask_height, height),
        taps_w=spatial or _most_taps(mask_width, width),
        scale_h=mask_height / height,
        scale_w=mask_width / width,
        RESAMPLE=mode,
        IS_UINT8=mask.dtype == torch.uint8,
    )


@functools.cache
def _most_taps(size_in: int, size_out: int) -> int:
    """The longest window of an area average, in inputs."""
    return max(-((i + 1) * size_in // -size_out) - i * size_in // size_out for i in range(size_out))


@functools.cache
def _gaussian(kernel_size: int) -> tuple[float, float]:
    """(exponent, norm): tap i of the blur is norm * 2 ** (exponent * i * i), with sigma = 0.3 ((k - 1) / 2 - 1) + 0.8."""
    sigma = 0.3 * ((kernel_size - 1) / 2 - 1) + 0.8
    exponent = -math.log2(math.e) / (2 * sigma**2)
    return exponent, 1 / math.fsum(2 ** (exponent * (i - kernel_size // 2) ** 2) for i in range(kernel_size))


def launch_weights(
    mask: torch.Tensor | None,
    config: Any,
    grid: tuple[int, int, int],
    batch: int,
    device: torch.device,
    *,
    has_prior: bool,
    prior_gate: torch.Tensor | None,
    mask_gate: torch.Tensor | None,
    stats: bool = False,
) -> MaskWeights:
    """One launch, two under a blur: the sums of the weights, and the weights where the loss kernel cannot make them itself.

    Args:
        mask: (B or 1, Fm, Hm, Wm), floating or uint8 (bool viewed as uint8 is not one: give it as a float).
        config: the fields of MaskedLossConfig that name the stages.
        grid: (F, H, W) of the loss.
        prior_gate, mask_gate: (B,), contiguous; the mask's as uint8.
    """
    frames, height, width = grid
    positions = frames * height * width
    launch = WeightsLaunch.choose(positions, batch)
    write = not on_grid(mask, grid, config)
    planes = PLANES_WITH_STATS if stats else PLANES
    result = MaskWeights(
        partials=torch.empty((planes, batch, launch.tiles), dtype=torch.float32, device=device),
        ticket=torch.empty((), dtype=torch.int32, device=device),
        w=torch.empty((batch, *grid), dtype=torch.float32, device=device) if write else None,
        v=torch.empty((batch, *grid), dtype=torch.float32, device=device) if write and has_prior else None,
    )
    stages = stage_arguments(config, has_prior, prior_gate, mask_gate)
    source, kernel_size = mask, 1
    if mask is not None and config.blur_kernel_size > 1:
        source = torch.empty((mask.shape[0], *grid), dtype=torch.float32, device=device)
        resample_kernel[(triton.cdiv(positions, launch.block), mask.shape[0])](
            mask_ptr=mask,
            raw_ptr=source,
            frames=frames,
            height=height,
            width=width,
            **{name: stages[name] for name in ("binarize", "HAS_BINARIZE", "INVERT")},
            **_resample_arguments(mask, grid, config.resample),
            BLOCK=launch.block,
            num_warps=launch.num_warps,
        )
        kernel_size = config.blur_kernel_size
    blur_exponent, blur_norm = _gaussian(kernel_size)
    resampling = _resample_arguments(source, grid, config.resample)
    flat = source is not None and tuple(source.shape[1:]) == grid and position_stride(source) == 1
    divisor = common_divisor([positions, resampling["mask_stride_b"]], 16)
    resampling["mask_stride_b"] //= divisor
    weights_kernel[(launch.tiles, batch)](
        mask_ptr=source,
        w_ptr=result.w,
        v_ptr=result.v,
        partials_ptr=result.partials,
        ticket_ptr=result.ticket,
        frames=frames,
        height=height,
        width=width,
        blocks_per_tile=launch.blocks_per_tile,
        blur_exponent=blur_exponent,
        blur_norm=blur_norm,
        **stages,
        **resampling,
        HAS_MASK=mask is not None,
        KERNEL_SIZE=kernel_size,
        WRITE_W=result.w is not None,
        WRITE_V=result.v is not None,
        STATS=stats,
        FLAT=flat,
        DIVISOR=divisor,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
    )
    return result
