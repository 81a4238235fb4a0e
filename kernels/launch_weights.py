"""The host's side of weights.py: how the kernels that turn a mask into weights are launched."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar

import torch

from masked_loss_triton.backend.layout import Layout, ceil_div, common_divisor
from masked_loss_triton.kernels.stages import COMPLEMENT, NO_PRIOR, THRESHOLD
from masked_loss_triton.kernels.sums import PLANES, PLANES_WITH_STATS
from masked_loss_triton.kernels.weights import resample_kernel, weights_kernel


@dataclasses.dataclass(frozen=True)
class WeightsLaunch:
    """Launch configuration of the weights kernel.

    block: 512 positions on 4 warps: four per thread, so that a float32 mask on the grid is read 128 bits at a time.
    tiles: programs for the batch. Every program of the loss kernel reads all partial sums, so there are at most 64 of them: 256
        bytes beside the 100 KB that it reads of everything else, and still enough programs for a mask of 1/16 of pred's bytes. A
        mask that is resampled may weigh more than pred, and gets up to 256.
    registers: what a thread of this kernel, and of the resampling one before a blur, may use at most: 4 programs are resident on
        every NVIDIA multiprocessor. Both read a mask, mostly a sixteenth of pred.
    """

    block: int
    tiles: int
    blocks_per_tile: int
    num_warps: int
    registers: ClassVar[int] = 128

    @classmethod
    def choose(cls, positions: int, batch: int, resampled: bool) -> WeightsLaunch:
        block = 512
        blocks = ceil_div(positions, block)
        tiles = min(blocks, max(1, (256 if resampled else 64) // batch))
        blocks_per_tile = ceil_div(blocks, tiles)
        return cls(block, ceil_div(blocks, blocks_per_tile), blocks_per_tile, 4)


@dataclasses.dataclass(frozen=True)
class MaskWeights:
    """What the loss kernel needs of the mask: partial sums, and either weight tensors or the mask itself."""

    partials: torch.Tensor  # (PLANES or PLANES_WITH_STATS, B, tiles) float32
    ticket: torch.Tensor  # () int32, 0 once the weights kernel ran
    w: torch.Tensor | None  # (B, F or 1, H, W) float32; None: the loss kernel makes it from the mask
    v: torch.Tensor | None


def on_grid(mask: Layout | None, grid: tuple[int, int, int], config: Any) -> bool:
    """True when each position's weight depends on one mask value only, so that no weight tensor needs to exist."""
    if mask is None:
        return True
    _, frames, height, width = mask.shape
    return (height, width) == grid[1:] and frames in (1, grid[0]) and config.blur_kernel_size <= 1


def stage_arguments(config: Any, has_prior: bool, has_prior_gate: bool, has_mask_gate: bool) -> dict[str, Any]:
    """The arguments of stages 1 to 7 that the weights kernel and the loss kernel share."""
    if not has_prior:
        region = NO_PRIOR.value
    elif config.prior_threshold is None:
        region = COMPLEMENT.value
    else:
        region = THRESHOLD.value
    return dict(
        binarize=0.0 if config.binarize is None else config.binarize,
        gamma=config.gamma,
        min_weight=config.min_weight,
        prior_threshold=config.prior_threshold or 0.0,
        HAS_BINARIZE=config.binarize is not None,
        INVERT=config.invert,
        HAS_GAMMA=config.gamma != 1,
        CLAMP_FLOOR=config.floor == "clamp",
        PRIOR_REGION=region,
        HAS_PRIOR_GATE=has_prior_gate,
        HAS_MASK_GATE=has_mask_gate,
    )


def in_order(kernel: Any, first: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a kernel from `first` on, in its order.

    Python finds each keyword of a call by looking through all names: with a hundred of them that is half the time of a launch.
    """
    names = kernel.arg_names[kernel.arg_names.index(first) :]
    if set(names) != set(arguments):
        raise TypeError(f"{kernel.__name__} takes {sorted(names)}, got {sorted(arguments)}")
    return tuple(arguments[name] for name in names)


def _resample_arguments(mask: Layout | None, grid: tuple[int, int, int], mode: str) -> dict[str, Any]:
    if mask is None:
        names = "mask_frames mask_height mask_width mask_stride_b mask_stride_f mask_stride_h mask_stride_w taps_f taps_h taps_w"
        ways = dict(RESAMPLE="area", IS_UINT8=False, FLAT=False, WINDOW_H=1, WINDOW_W=1)
        return dict.fromkeys(names.split(), 1) | dict(scale_h=1.0, scale_w=1.0) | ways
    frames, height, width = grid
    _, mask_frames, mask_height, mask_width = mask.shape
    if (mask_height, mask_width) == (height, width):
        mode = "area"  # a window of one: the value itself, also beside a NaN
    spatial = {"area": None, "nearest": 1, "nearest-exact": 1, "bilinear": 2, "bicubic": 4}[mode]
    return dict(
        mask_frames=mask_frames,
        mask_height=mask_height,
        mask_width=mask_width,
        mask_stride_b=0 if mask.shape[0] == 1 else mask.strides[0],
        mask_stride_f=mask.strides[1],
        mask_stride_h=mask.strides[2],
        mask_stride_w=mask.strides[3],
        taps_f=_most_taps(mask_frames, frames),
        taps_h=spatial or _most_taps(mask_height, height),
        taps_w=spatial or _most_taps(mask_width, width),
        scale_h=mask_height / height,
        scale_w=mask_width / width,
        RESAMPLE=mode,
        IS_UINT8=mask.dtype == torch.uint8,
        FLAT=mask.shape[1:] == grid and mask.position_stride == 1,
        **_windows(mask, grid, mode),
    )


def _divided(resampling: dict[str, Any], positions: int) -> dict[str, Any]:
    """The step from sample to sample, and the number of positions in the kernel, divided by what divides both."""
    divisor = common_divisor([positions, resampling["mask_stride_b"]], 16)
    return resampling | dict(mask_stride_b=resampling["mask_stride_b"] // divisor, DIVISOR=divisor)


def _windows(mask: Layout, grid: tuple[int, int, int], mode: str) -> dict[str, int]:
    """The size of the window that each position covers exactly, 1 x 1 where there is none that can be read row by row."""
    down, down_rest = divmod(mask.shape[2], grid[1])
    across, across_rest = divmod(mask.shape[3], grid[2])
    exact = mode == "area" and mask.strides[3] == 1 and (down_rest, across_rest) == (0, 0)
    if exact and down <= 16 and across in (2, 4, 8, 16):
        return dict(WINDOW_H=down, WINDOW_W=across)
    return dict(WINDOW_H=1, WINDOW_W=1)


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


@dataclasses.dataclass(frozen=True)
class WeightsPlan:
    """Everything of the launches that the numbers in the tensors do not change.

    frames: of the weights, 1 where the mask has one.
    resample_grid, resample_arguments: of the launch before a blur, None and () without one.
    arguments: of the weights kernel, whose grid is (tiles, B). Both from `binarize` on.
    """

    launch: WeightsLaunch
    frames: int
    planes: int
    writes_w: bool
    writes_v: bool
    resample_grid: tuple[int, int] | None
    resample_arguments: tuple[Any, ...]
    arguments: tuple[Any, ...]


@functools.lru_cache(maxsize=256)
def plan_weights(
    mask: Layout | None,
    config: Any,
    grid: tuple[int, int, int],
    batch: int,
    has_prior: bool,
    has_prior_gate: bool,
    has_mask_gate: bool,
    stats: bool,
) -> WeightsPlan:
    """The plan of a call whose tensors lie like this; made once, since it takes longer than what a call does anew."""
    writes = not on_grid(mask, grid, config)
    # A mask of one frame is made into weights once, and counted for each frame.
    frames = 1 if mask is None or mask.shape[1] == 1 else grid[0]
    repeats = grid[0] // frames
    grid = (frames, *grid[1:])
    _, height, width = grid
    positions = frames * height * width
    launch = WeightsLaunch.choose(positions, batch, mask is not None and mask.shape[2:] != grid[1:])
    stages = stage_arguments(config, has_prior, has_prior_gate, has_mask_gate)
    sizes = dict(frames=frames, height=height, width=width)
    source, kernel_size = mask, 1
    resample_grid, resample_arguments = None, ()
    if mask is not None and config.blur_kernel_size > 1:
        resample_grid = (ceil_div(positions, launch.block), mask.shape[0])
        arguments = dict(
            **sizes,
            **{name: stages[name] for name in ("binarize", "HAS_BINARIZE", "INVERT")},
            **_divided(_resample_arguments(mask, grid, config.resample), positions),
            BLOCK=launch.block,
        )
        resample_arguments = in_order(resample_kernel, "binarize", arguments)
        source = Layout((mask.shape[0], *grid), (positions, height * width, width, 1), torch.float32)
        kernel_size = config.blur_kernel_size
    blur_exponent, blur_norm = _gaussian(kernel_size)
    arguments = dict(
        **sizes,
        **stages,
        **_divided(_resample_arguments(source, grid, config.resample), positions),
        blocks_per_tile=launch.blocks_per_tile,
        repeats=repeats,
        blur_exponent=blur_exponent,
        blur_norm=blur_norm,
        HAS_MASK=mask is not None,
        KERNEL_SIZE=kernel_size,
        WRITE_W=writes,
        WRITE_V=writes and has_prior,
        STATS=stats,
        BLOCK=launch.block,
    )
    return WeightsPlan(
        launch=launch,
        frames=frames,
        planes=PLANES_WITH_STATS if stats else PLANES,
        writes_w=writes,
        writes_v=writes and has_prior,
        resample_grid=resample_grid,
        resample_arguments=resample_arguments,
        arguments=in_order(weights_kernel, "binarize", arguments),
    )


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
        mask: (B or 1, Fm, Hm, Wm), floating, bool or uint8.
        config: the fields of MaskedLossConfig that name the stages.
        grid: (F, H, W) of the loss.
        prior_gate, mask_gate: (B,), contiguous.
    """
    gates = prior_gate is not None, mask_gate is not None
    plan = plan_weights(Layout.of(mask), config, grid, batch, has_prior, *gates, stats)
    shape = (plan.frames, *grid[1:])
    result = MaskWeights(
        partials=torch.empty((plan.planes, batch, plan.launch.tiles), dtype=torch.float32, device=device),
        ticket=torch.empty((), dtype=torch.int32, device=device),
        w=torch.empty((batch, *shape), dtype=torch.float32, device=device) if plan.writes_w else None,
        v=torch.empty((batch, *shape), dtype=torch.float32, device=device) if plan.writes_v else None,
    )
    source, num_warps = mask, plan.launch.num_warps
    if mask is not None and plan.resample_grid is not None:
        source = torch.empty((mask.shape[0], *shape), dtype=torch.float32, device=device)
        resample_kernel[plan.resample_grid](mask, source, *plan.resample_arguments, num_warps=num_warps)
    pointers = source, prior_gate, mask_gate, result.w, result.v, result.partials, result.ticket
    weights_kernel[(plan.launch.tiles, batch)](*pointers, *plan.arguments, num_warps=num_warps)
    return result
