"""The host's side of loss.py: how the loss and the scaling of its gradient are launched."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import torch
import triton.language as tl

from masked_loss_triton.backend.layout import Layout, ceil_div, common_divisor, next_power_of_2
from masked_loss_triton.kernels.launch_weights import MaskWeights, in_order, stage_arguments
from masked_loss_triton.kernels.loss import loss_kernel, scale_kernel
from masked_loss_triton.kernels.sums import MEAN, MEAN_ONE, STATS, WEIGHTED_MEAN


@dataclasses.dataclass(frozen=True)
class LossLaunch:
    """Launch configuration of the loss kernel.

    vector, block_p, block_c: a thread holds 16 bytes of one channel of the widest operand (4 float32 or 8 halves: one 128-bit
        access; a half beside a float32 is read 64 bits at a time, since 8 float32 per thread would leave half of each sector to
        the next access), 4 warps lie along the positions, and block_c channels are in flight per thread. Where channels are
        the innermost axis it is the other way. Where positions are not one run, each element has an offset of its own in every
        tensor, and a thread takes 4 halves.
    channel_blocks: how many blocks of channels a program walks with the same weights in registers. All of them, so that the
        mask is read once, unless the grid would not fill the device: then the channels are split, and the mask, then small,
        comes from the second-level cache.
    registers: what a thread may use at most, and what the compiler is told. With 64, 8 programs of 128 threads fit on an NVIDIA
        multiprocessor, with the 96 that a prior takes 5, with the 128 of tensors that are not one run 4. Each has 16 KB in
        flight (4 channels x 16 bytes x 2 tensors x 128 threads), of halves 8 KB. 16 KB is what 3.35 TB/s times 0.6 microseconds
        need for each multiprocessor of an H100: two programs would do.
    """

    vector: int
    block_p: int
    block_c: int
    channel_blocks: int
    registers: int
    num_warps: int = 4
    without_prior: ClassVar[int] = 64
    with_prior: ClassVar[int] = 96
    scattered: ClassVar[int] = 128  # positions that are not one run

    @classmethod
    def choose(
        cls,
        batch: int,
        channels: int,
        positions: int,
        itemsize: int,
        flat: bool,
        channels_innermost: bool,
        has_prior: bool,
        multiprocessors: int,
    ) -> LossLaunch:
        vector = 16 // max(itemsize, 2 if flat else 4)
        if channels_innermost:
            block_c = min(32, next_power_of_2(channels))
            block_p = max(16, 128 * 16 // block_c)
        else:
            block_p = 128 * vector
            while block_p > 128 and block_p // 2 >= positions:
                block_p //= 2
            block_c = min(16 // vector, next_power_of_2(channels))
        all_blocks = ceil_div(channels, block_c)
        programs = ceil_div(positions, block_p) * batch
        # Two programs of four warps per multiprocessor keep 32 KB in flight there, of halves 16: what its memory latency needs.
        groups = min(all_blocks, max(1, ceil_div(2 * multiprocessors, programs) if programs < multiprocessors else 1))
        channel_blocks = ceil_div(all_blocks, groups)
        registers = (cls.with_prior if has_prior else cls.without_prior) if flat else cls.scattered
        return cls(vector, block_p, block_c, channel_blocks, registers)

    def grid(self, batch: int, channels: int, positions: int) -> tuple[int, int, int]:
        return (
            ceil_div(positions, self.block_p),
            ceil_div(channels, self.block_c * self.channel_blocks),
            batch,
        )

    def options(self) -> dict[str, int]:
        """Of the launch. Without the limit, ptxas may spill registers for an occupancy that nobody needs."""
        # Only the CUDA compiler knows the option; AMD's multiprocessors have twice the registers.
        limit = {} if torch.version.hip else dict(maxnreg=self.registers)
        return dict(num_warps=self.num_warps, **limit)


@functools.lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # the interpreter; small, but enough that small inputs take the path that splits the channels


NORMALIZATIONS = {"weighted_mean": WEIGHTED_MEAN.value, "mean_one": MEAN_ONE.value, "mean": MEAN.value}


class Present(NamedTuple):
    """Which optional arguments a call has, and what it asks for. one_frame: the weights or the mask have one, pred has several."""

    one_frame: bool
    w: bool
    v: bool
    factors: bool
    weighting: bool
    prior_weights: bool
    prior_gate: bool
    mask_gate: bool
    grad_output: bool
    loss: bool
    stats: bool


@dataclasses.dataclass(frozen=True)
class LossPlan:
    """Everything of a launch that the numbers in the tensors do not change."""

    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]  # of the kernel, from `binarize` on
    options: dict[str, int]


@functools.lru_cache(maxsize=256)
def plan_loss(
    pred: Layout,
    target: Layout,
    latents: Layout | None,
    prior: Layout | None,
    gradient: Layout | None,
    mask: Layout | None,
    tiles: int,
    config: Any,
    present: Present,
    multiprocessors: int,
) -> LossPlan:
    """The plan of a call whose tensors lie like this; made once, since it takes longer than what a call does anew.

    Args:
        mask: the one that the loss kernel reads itself, or None. tiles: of the partial sums of the weights.
    """
    batch, channels, frames, height, width = pred.shape
    positions = frames * height * width
    tensors = {"pred": pred, "target": target, "latents": latents, "prior": prior, "gradient": gradient}
    given = [tensor for tensor in tensors.values() if tensor is not None]
    flat = all(tensor.position_stride is not None for tensor in given)
    mask_flat = mask is not None and mask.position_stride == 1
    channels_innermost = channels > 1 and pred.strides[1] == 1 and positions > 1
    itemsize = max(tensor.dtype.itemsize for tensor in given)
    in_rows = flat and all(tensor.strides[1] == positions for tensor in given)
    fold = 2 if in_rows and itemsize == 2 and positions % 8 == 4 and channels % 2 == 0 else 1

    steps = {name: tensor.used_strides for name, tensor in tensors.items() if tensor is not None}
    steps = {name: (step[0], step[1] * fold, *step[2:]) for name, step in steps.items()}
    used = [number for step in steps.values() for number in (step[:2] if flat else step[:4])]
    divisor = common_divisor([positions * fold, *used], 16)
    strides: dict[str, int] = {}
    for name, tensor in tensors.items():
        step_b, step_c, step_f, step_h, step_w = steps.get(name, (0,) * 5)
        if flat and tensor is not None:
            step_w = tensor.position_stride or 0
        values = (step_b // divisor, step_c // divisor, step_f // divisor, step_h // divisor, step_w)
        strides |= {f"{name}_stride_{axis}": value for axis, value in zip("bcfhw", values, strict=True)}
    mask_steps = (0,) * 4 if mask is None else mask.used_strides
    mask_divisor = common_divisor([mask_steps[0]], 16) if mask_flat else 1
    strides |= dict(
        mask_stride_b=mask_steps[0] // mask_divisor,
        mask_stride_f=mask_steps[1],
        mask_stride_h=mask_steps[2],
        mask_stride_w=1 if mask_flat else mask_steps[3],
    )

    rows = channels // fold, positions * fold
    launch = LossLaunch.choose(batch, *rows, itemsize, flat, channels_innermost, prior is not None, multiprocessors)
    wide = max(tensor.span for tensor in (*given, mask) if tensor is not None) >= 2**31
    arguments = dict(
        area_scale_beta=config.area_scale_beta,
        eps=config.eps,
        delta=config.loss_delta,
        batch=batch,
        channels=channels,
        frames=frames,
        height=height,
        width=width,
        tiles=tiles,
        **strides,
        **stage_arguments(config, prior is not None, present.prior_gate, present.mask_gate),
        HAS_LATENTS=latents is not None,
        HAS_PRIOR=prior is not None,
        HAS_MASK=mask is not None,
        HAS_W=present.w,
        HAS_V=present.v,
        HAS_FACTORS=present.factors,
        HAS_WEIGHTING=present.weighting,
        HAS_PRIOR_WEIGHT=present.prior_weights,
        HAS_AREA_SCALE=config.area_scale_beta != 0,
        HAS_GRAD_OUTPUT=present.grad_output,
        WRITE_GRADIENT=gradient is not None,
        WRITE_LOSS=present.loss,
        WRITE_WEIGHT_STATS=present.stats,
        IS_UINT8=mask is not None and mask.dtype == torch.uint8,
        NORMALIZATION=NORMALIZATIONS[config.normalization],
        PER_SAMPLE=config.per_sample,
        LOSS_TYPE=config.loss_type,
        FLAT=flat,
        FOLD=fold,
        MASK_FLAT=mask_flat,
        ONE_FRAME=present.one_frame,
        # Neighbours whose weights are neighbours too: their number divides every place where a frame or a fold ends.
        CELL_VECTOR=common_divisor([height * width if present.one_frame else positions], launch.vector),
        DIVISOR=divisor,
        MASK_DIVISOR=mask_divisor,
        VECTOR=launch.vector,
        OFFSET=tl.int64 if wide else tl.int32,
        # At least one element per thread: fewer would be read once by every warp.
        BLOCK_TILES=max(32 * launch.num_warps, next_power_of_2(min(1024, tiles * (1 if config.per_sample else batch)))),
        BLOCK_C=launch.block_c,
        CHANNEL_BLOCKS=launch.channel_blocks,
        BLOCK_P=launch.block_p,
    )
    return LossPlan(launch.grid(batch, *rows), in_order(loss_kernel, "binarize", arguments), launch.options())


def launch_loss(
    pred: torch.Tensor,
    target: torch.Tensor,
    latents: torch.Tensor | None,
    prior: torch.Tensor | None,
    mask: torch.Tensor | None,
    weights: MaskWeights,
    config: Any,
    *,
    flow_sign: int,
    weighting: torch.Tensor | None,
    prior_weight: torch.Tensor | float,
    prior_gate: torch.Tensor | None,
    mask_gate: torch.Tensor | None,
    factors: torch.Tensor | None,
    grad_output: torch.Tensor | None = None,
    write_gradient: bool = True,
    write_loss: bool = True,
    stats: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch: (loss, stats, gradient); what was not asked for is an empty tensor.

    Args:
        pred, target, latents, prior: (B, C, F, H, W), any strides, any floating dtype.
        mask, weights, prior_gate, mask_gate: what `launch_weights` took and gave.
        factors: (2, B) float32, or None to make them from the sums in `weights`.
        weighting, prior_weight: (B,) contiguous, or for the latter one number.
        grad_output: 0-d; the gradient is multiplied by it before it is rounded to pred's dtype.

    Returns:
        loss: 0-d float32. stats: (STATS,) float32, only its first three without `stats`. gradient: as pred.
    """
    device = pred.device
    gradient = torch.empty_like(pred) if write_gradient else pred.new_empty(0)
    direct_mask = mask if weights.w is None else None
    prior_weights = prior_weight if isinstance(prior_weight, torch.Tensor) else None
    weight_frames = next((x.shape[1] for x in (weights.w, mask) if x is not None), 1)
    present = Present(
        one_frame=weight_frames == 1 < pred.shape[2],
        w=weights.w is not None,
        v=weights.v is not None,
        factors=factors is not None,
        weighting=weighting is not None,
        prior_weights=prior_weights is not None,
        prior_gate=prior_gate is not None,
        mask_gate=mask_gate is not None,
        grad_output=grad_output is not None,
        loss=write_loss,
        stats=stats,
    )
    plan = plan_loss(
        Layout(pred.shape, pred.stride(), pred.dtype),
        Layout(target.shape, target.stride(), target.dtype),
        Layout.of(latents),
        Layout.of(prior),
        Layout.of(gradient) if write_gradient else None,
        Layout.of(direct_mask),
        weights.partials.shape[2],
        config,
        present,
        _multiprocessors(device),
    )
    loss = torch.empty((), dtype=torch.float32, device=device)
    numbers = torch.empty(STATS, dtype=torch.float32, device=device)
    terms = torch.empty((2, math.prod(plan.grid)), dtype=torch.float32, device=device) if write_loss else None
    loss_kernel[plan.grid](
        pred,
        target,
        latents,
        prior,
        gradient,
        direct_mask,
        weights.w,
        weights.v,
        prior_gate,
        mask_gate,
        weights.partials,
        factors,
        weighting,
        prior_weights,
        grad_output,
        terms,
        loss,
        numbers,
        weights.ticket,
        0.0 if prior_weights is not None else prior_weight,
        float(flow_sign),
        *plan.arguments,
        **plan.options,
    )
    return loss, numbers, gradient


@dataclasses.dataclass(frozen=True)
class ScaleLaunch:
    """Launch configuration of the scale kernel.

    block: 4096 elements on 4 warps, 32 per thread: a plain backward starts few programs that read one number and return.
    registers: what a thread may use at most: its 32 elements and little else. 12 programs are resident.
    """

    block: int = 4096
    num_warps: int = 4
    registers: ClassVar[int] = 40


def launch_scale(gradient: torch.Tensor, grad_output: torch.Tensor) -> None:
    """gradient *= grad_output in place, one launch. `gradient` is dense, in any order of axes; grad_output 0-d."""
    launch, count = ScaleLaunch(), gradient.numel()
    scale_kernel[(ceil_div(count, launch.block),)](
        gradient, grad_output, count, BLOCK=launch.block, num_warps=launch.num_warps
    )
