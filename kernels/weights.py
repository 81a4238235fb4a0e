"""From the mask to the sums of the weights, and to weight tensors where they are needed.

    sum(w), sum(v), sum(m)  over the positions of each sample        the stages of w and v: stages.py

`resample_kernel` writes the raw mask, needed only under a blur, which looks at neighbours. `weights_kernel` makes the sums, and
writes the weights where the loss kernel cannot make them again in registers from a mask on its own grid.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
import triton
import triton.language as tl

from masked_loss_triton.backend.layout import Layout, ceil_div, common_divisor
from masked_loss_triton.kernels import devices
from masked_loss_triton.kernels.devices import let_next_begin
from masked_loss_triton.kernels.launches import FUSION, Launches
from masked_loss_triton.kernels.operands import coded, decoded, step_of, warps
from masked_loss_triton.kernels.resampling import place, raw_mask, resampling_of
from masked_loss_triton.kernels.stages import (
    Gates,
    StageOptions,
    Stages,
    gaussian_tap,
    sample_gates,
    smaller,
    snapped,
    target_and_prior_weight,
)
from masked_loss_triton.kernels.sums import (
    MIN_RAW,
    PLANES,
    PLANES_WITH_STATS,
    SUM_OUTSIDE,
    SUM_OVERLAP,
    SUM_RAW,
    SUM_V,
    SUM_W,
    lower,
)
from masked_loss_triton.kernels.upstream import ONE, Upstream

if TYPE_CHECKING:
    from masked_loss_triton.call import LossInputs
    from masked_loss_triton.config import MaskedLossConfig


class MaskWeights(NamedTuple):
    """What the loss kernel needs of the mask: partial sums, and either weight tensors or the mask itself."""

    partials_ptr: torch.Tensor  # (PLANES or PLANES_WITH_STATS, B, tiles) float32
    ticket_ptr: torch.Tensor  # () int32, set to 0 for the loss kernel that follows
    w_ptr: torch.Tensor | None  # (B, F or 1, H, W) float32, contiguous; None: made from the mask in registers
    v_ptr: torch.Tensor | None
    m_ptr: torch.Tensor | None  # the raw mask, for the statistics


class Blur(NamedTuple):
    """The Gaussian of stage 3: tap i, from the middle, is norm * 2 ** (exponent * i * i)."""

    exponent: float
    norm: float

    @classmethod
    def of(cls, kernel_size: int) -> Blur:
        sigma = 0.3 * ((kernel_size - 1) / 2 - 1) + 0.8
        exponent = -math.log2(math.e) / (2 * sigma**2)
        return cls(exponent, 1 / math.fsum(2 ** (exponent * (i - kernel_size // 2) ** 2) for i in range(kernel_size)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightsOptions(StageOptions):
    """What the code of the two kernels depends on.

    Args:
        MODE: how the mask is resampled. FLAT: it is one run of memory on the grid, and is not.
        WINDOW_H, WINDOW_W: mask values under each position, where they are exact and rows are runs of memory; else 1.
        PACKED: see `place`.
        DIVISOR: divides the number of positions and the mask's step from sample to sample (operands.py).
    """

    HAS_PRIOR: bool
    STATS: bool
    MODE: str = "area"
    FLAT: bool = True
    WINDOW_H: int = 1
    WINDOW_W: int = 1
    DIVISOR: int
    KERNEL_SIZE: int = 1
    PACKED: bool = False
    BLOCK: int


@triton.jit
def resample_kernel(mask_ptr, raw_ptr, minus_most_ptr, grid, how, stages, OPTIONS: tl.constexpr):
    """Writes the raw mask, (B or 1, F or 1, H, W) float32, contiguous; grid (blocks, B or 1).

    With STATS also minus the largest mask value of each block, (B or 1, blocks).
    """
    b = tl.program_id(1).to(tl.int64)
    positions = grid[0] * grid[1] * grid[2] // OPTIONS.DIVISOR * OPTIONS.DIVISOR
    position = tl.program_id(0) * OPTIONS.BLOCK + tl.arange(0, OPTIONS.BLOCK)
    valid = position < positions
    m, minus_most = raw_mask(mask_ptr + b * step_of(how.b, OPTIONS), position, valid, grid, how, stages, OPTIONS)
    tl.store(raw_ptr + b * positions + position, m, mask=valid)
    if OPTIONS.STATS:
        block = b * tl.num_programs(0) + tl.program_id(0)
        tl.store(minus_most_ptr + block, tl.reduce(minus_most, 0, smaller))


@triton.jit
def blurred_mask(raw_ptr, position, valid, grid, blur, OPTIONS: tl.constexpr):
    """Blurs a contiguous raw mask over height and width, stage 3, borders replicated."""
    KERNEL_SIZE: tl.constexpr = OPTIONS.KERNEL_SIZE
    frame, row, column = place(position, grid, OPTIONS)
    total = tl.zeros(position.shape, tl.float32)
    for kh in range(KERNEL_SIZE):
        tap_row = tl.minimum(tl.maximum(row + kh - KERNEL_SIZE // 2, 0), grid[1] - 1)
        of_row = tl.zeros(position.shape, tl.float32)
        for kw in range(KERNEL_SIZE):
            tap_column = tl.minimum(tl.maximum(column + kw - KERNEL_SIZE // 2, 0), grid[2] - 1)
            neighbour = (frame * grid[1] + tap_row) * grid[2] + tap_column
            value = tl.load(raw_ptr + neighbour, mask=valid, other=0.0)
            of_row += gaussian_tap(kw - KERNEL_SIZE // 2, blur.exponent, blur.norm) * value
        total += gaussian_tap(kh - KERNEL_SIZE // 2, blur.exponent, blur.norm) * of_row
    return total


@triton.jit(do_not_specialize=["repeats"])
def weights_kernel(
    mask_ptr,  # the mask, under a blur the raw mask, or None
    minus_most_ptr,  # what `resample_kernel` wrote, or None
    gates,
    result,  # `MaskWeights`
    upstream,
    grid,  # (F or 1, H, W) of the weights
    how,  # `Resampling`, or None without a mask
    stages,
    blur,  # `Blur`, or None
    blocks_per_tile,
    repeats,  # frames of the loss for each frame of weights
    OPTIONS: tl.constexpr,
):
    """Writes the weights if asked, and the partial sums of each tile; grid (tiles, B). A mask of one frame has weights of one.

    Sums over tiles are left to their readers: a few dozen numbers, added in a fixed order, without atomics.
    """
    BLOCK: tl.constexpr = OPTIONS.BLOCK
    HAS_PRIOR: tl.constexpr = OPTIONS.HAS_PRIOR
    if OPTIONS.OVERLAPS:
        let_next_begin()
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    grid = (decoded(grid[0], OPTIONS), decoded(grid[1], OPTIONS), decoded(grid[2], OPTIONS))
    if (tile == 0) & (b == 0):
        tl.store(result.ticket_ptr, 0)
        if upstream.expected_ptr is not None:
            tl.store(upstream.expected_ptr, tl.load(upstream.last_ptr))
    # Divided and multiplied back: the compiler then knows what divides it, and a mask in one run is read 128 bits at a time.
    positions = grid[0] * grid[1] * grid[2] // OPTIONS.DIVISOR * OPTIONS.DIVISOR
    prior_gate, mask_gate = sample_gates(gates, b)

    sum_w = tl.zeros((BLOCK,), tl.float32)
    sum_v = tl.zeros((BLOCK,), tl.float32)
    sum_raw = tl.zeros((BLOCK,), tl.float32)
    if OPTIONS.STATS:
        sum_overlap = tl.zeros((BLOCK,), tl.float32)
        sum_outside = tl.zeros((BLOCK,), tl.float32)
        most = tl.full((BLOCK,), float("inf"), tl.float32)
        extremes = (most, most, most, most, most, most, most)

    for step in range(blocks_per_tile):
        position = (tile * blocks_per_tile + step) * BLOCK + tl.arange(0, BLOCK)
        valid = position < positions
        if mask_ptr is None:
            raw = tl.full((BLOCK,), 1.0, tl.float32)
            blurred = raw
            minus_most = -raw
        elif blur is None:
            sample_ptr = mask_ptr + b * step_of(how.b, OPTIONS)
            raw, minus_most = raw_mask(sample_ptr, position, valid, grid, how, stages, OPTIONS)
            blurred = raw
        else:
            sample_ptr = mask_ptr + b * step_of(how.b, OPTIONS)
            cell = position
            if OPTIONS.PACKED:
                _, row, column = place(position, grid, OPTIONS)
                cell = row * grid[2] + column
            raw = tl.load(sample_ptr + cell, mask=valid, other=0.0)
            blurred = snapped(blurred_mask(sample_ptr, position, valid, grid, blur, OPTIONS))
            minus_most = -raw
            if OPTIONS.STATS:
                blocks = (positions + BLOCK - 1) // BLOCK
                block = tl.minimum(tile * blocks_per_tile + step, blocks - 1)
                # The stride is 0 where all samples share one mask.
                row = tl.where(step_of(how.b, OPTIONS) == 0, 0, b)
                minus_most = tl.full((BLOCK,), 0.0, tl.float32) + tl.load(minus_most_ptr + row * blocks + block)
        w, v = target_and_prior_weight(raw, blurred, prior_gate, mask_gate, stages, OPTIONS, HAS_PRIOR)
        raw = tl.where(mask_gate, raw, 1.0)
        if result.w_ptr is not None:
            tl.store(result.w_ptr + b * positions + position, w, mask=valid)
        if result.v_ptr is not None:
            tl.store(result.v_ptr + b * positions + position, v, mask=valid)
        sum_w += tl.where(valid, w, 0.0)
        sum_v += tl.where(valid, v, 0.0)
        sum_raw += tl.where(valid, raw, 0.0)
        if OPTIONS.STATS:
            sum_overlap += tl.where(valid, tl.where(w < v, w, v), 0.0)
            if result.m_ptr is not None:
                tl.store(result.m_ptr + b * positions + position, raw, mask=valid)
            sum_outside += tl.where(valid, 1.0 - raw, 0.0)
            extremes = lower(extremes, (raw, -raw, w, -w, v, -v, minus_most), valid)

    tiles = tl.num_programs(0)
    plane = tl.num_programs(1) * tiles
    partial_ptr = result.partials_ptr + b * tiles + tile
    tl.store(partial_ptr + SUM_W * plane, tl.sum(sum_w, axis=0) * repeats)
    tl.store(partial_ptr + SUM_V * plane, tl.sum(sum_v, axis=0) * repeats)
    tl.store(partial_ptr + SUM_RAW * plane, tl.sum(sum_raw, axis=0) * repeats)
    if OPTIONS.STATS:
        tl.store(partial_ptr + SUM_OVERLAP * plane, tl.sum(sum_overlap, axis=0) * repeats)
        tl.store(partial_ptr + SUM_OUTSIDE * plane, tl.sum(sum_outside, axis=0) * repeats)
        for which in tl.static_range(7):
            tl.store(partial_ptr + (MIN_RAW + which) * plane, tl.reduce(extremes[which], 0, smaller))


@dataclasses.dataclass(frozen=True)
class WeightsLaunch:
    """Launch configuration of the weights kernel, and of the resampling one before a blur.

    block: 512 positions on 128 threads: four for each, so that a float32 mask on the grid is read 128 bits at a time.
    tiles: programs for the batch, up to 1,024: as many as fill every device, each with one 16-byte load in flight per thread and
        little more to do. Every program of the loss kernel reads all partial sums: 4 KB then, beside the 100 KB and more that it
        reads of everything else.
    registers: what a thread may use at most: 4 programs are resident on every NVIDIA multiprocessor. Both kernels read a mask,
        mostly a sixteenth of pred.
    """

    block: int
    tiles: int
    blocks_per_tile: int
    num_warps: int = dataclasses.field(default_factory=warps)
    registers: ClassVar[int] = 128

    @classmethod
    def choose(cls, positions: int, batch: int) -> WeightsLaunch:
        block = 512
        blocks = ceil_div(positions, block)
        tiles = min(blocks, max(1, 1024 // batch))
        blocks_per_tile = ceil_div(blocks, tiles)
        return cls(block, ceil_div(blocks, blocks_per_tile), blocks_per_tile)


@dataclasses.dataclass(frozen=True)
class WeightsPlan:
    """Everything of the launches that the numbers in the tensors do not change.

    Args:
        writes: the loss kernel cannot make the weights itself from the mask.
        shape: of the weights of a sample, (F or 1, H, W).
        before_blur: arguments of the resampling kernel from `grid` on, or None. arguments: those of the weights kernel.
    """

    launch: WeightsLaunch
    writes: bool
    shape: tuple[int, int, int]
    before_blur: tuple[object, ...] | None
    arguments: tuple[object, ...]


@functools.lru_cache(maxsize=256)
def plan_weights(
    mask: Layout | None,
    config: MaskedLossConfig,
    grid: tuple[int, int, int],
    batch: int,
    has_prior: bool,
    stats: bool,
    packed: bool = False,
    overlaps: bool = False,
) -> WeightsPlan:
    """The plan of a call whose tensors lie like this; made once, since it takes longer than what a call does anew."""
    # A mask of one frame is made into weights once, and counted for each frame.
    frames = 1 if mask is None or mask.shape[1] == 1 else grid[0]
    shape = (frames, *grid[1:])
    positions = math.prod(shape)
    blurred = mask is not None and config.blur_kernel_size > 1
    on_grid = mask is None or (mask.shape[2:] == grid[1:] and mask.shape[1] in (1, grid[0]))
    launch = WeightsLaunch.choose(positions, batch)
    stages = Stages.of(config)

    def options(**more: bool | int | str) -> WeightsOptions:
        fields = dict(INVERT=config.invert, FLOOR=config.floor, HAS_PRIOR=has_prior, STATS=stats, BLOCK=launch.block)
        return WeightsOptions(**{**fields, **more})  # type: ignore[arg-type]

    how = blur = before_blur = None
    more: dict[str, bool | int | str] = dict(DIVISOR=common_divisor([positions], 16))
    if mask is not None:
        how, more = resampling_of(mask, shape, config.resample, packed and not blurred)
    if mask is not None and blurred:
        before_blur = (shape, how, stages, options(**more))
        raw = Layout((mask.shape[0], *shape), (positions, positions // frames, grid[2], 1), torch.float32)
        how, more = resampling_of(raw, shape, config.resample, packed)
        more |= dict(KERNEL_SIZE=config.blur_kernel_size)
        blur = Blur.of(config.blur_kernel_size)
    if packed and mask is not None:
        more |= dict(PACKED=True)
    # A blur reads neighbours: there the compiler needs to know the sizes.
    code = not blurred and bool(more.get("FLAT", True))
    more |= dict(CODED=code, OVERLAPS=overlaps)
    if how is not None:
        how = how._replace(b=coded([how.b], code)[0])
    arguments = (coded(shape, code), how, stages, blur, launch.blocks_per_tile, grid[0] // frames, options(**more))
    return WeightsPlan(launch, not on_grid or blurred or (packed and mask is not None), shape, before_blur, arguments)


def launch_weights(
    call: LossInputs,
    gates: Gates,
    config: MaskedLossConfig,
    launches: Launches,
    upstream: Upstream = ONE,
    stats: bool = False,
) -> MaskWeights:
    """The sums of the weights, and the weights where the loss kernel cannot make them itself: one launch, two under a blur."""
    mask, batch, device = call.mask, call.pred.shape[0], call.pred.device
    has_prior = call.prior is not None
    packed, overlaps = call.patches is not None, devices.hardware(device).overlaps
    plan = plan_weights(Layout.of(mask), config, call.grid, batch, has_prior, stats, packed, overlaps)
    tiles, num_warps = plan.launch.tiles, plan.launch.num_warps
    planes, shape = PLANES_WITH_STATS if stats else PLANES, (batch, *plan.shape)
    result = MaskWeights(
        launches.empty((planes, batch, tiles), device),
        launches.empty((), device, torch.int32),
        launches.empty(shape, device) if plan.writes else None,
        launches.empty(shape, device) if plan.writes and has_prior else None,
        launches.empty(shape, device) if plan.writes and stats else None,
    )
    minus_most = None
    if mask is not None and plan.before_blur is not None:
        raw = launches.empty((mask.shape[0], *plan.shape), device)
        size = (ceil_div(math.prod(plan.shape), plan.launch.block), mask.shape[0])
        minus_most = launches.empty((size[1], size[0]), device) if stats else None
        arguments = (mask, raw, minus_most, *plan.before_blur)
        launches.add(resample_kernel[size](*arguments, num_warps=num_warps, **FUSION), size, arguments)
        mask = raw
    arguments = (mask, minus_most, gates, result, upstream, *plan.arguments)
    grid = (tiles, batch)
    launches.add(weights_kernel[grid](*arguments, num_warps=num_warps, **FUSION), grid, arguments)
    return result
