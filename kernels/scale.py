"""The gradient times what arrives from above, in place: the backward of a loss whose gradient its forward has written."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import triton
import triton.language as tl

from masked_loss_triton.backend.layout import ceil_div
from masked_loss_triton.kernels.launches import FUSION, Launches
from masked_loss_triton.kernels.operands import warps


@triton.jit
def scale_kernel(gradient_ptr, grad_output_ptr, count, BLOCK: tl.constexpr):
    """Multiplies the gradient by grad_output in place; where that is 1, as after `loss.backward()`, one load and nothing else."""
    grad_output = tl.load(grad_output_ptr).to(tl.float32)
    if grad_output != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient_ptr + index, mask=index < count, other=0.0).to(tl.float32) * grad_output
        tl.store(gradient_ptr + index, value.to(gradient_ptr.dtype.element_ty), mask=index < count)


@dataclasses.dataclass(frozen=True)
class ScaleLaunch:
    """Launch configuration of the scale kernel.

    block: 4096 elements on 128 threads, 32 for each: a plain backward starts few programs that read one number and return.
    registers: what a thread may use at most: its 32 elements and little else. 12 programs are resident.
    """

    block: int = 4096
    num_warps: int = dataclasses.field(default_factory=warps)
    registers: ClassVar[int] = 40


def launch_scale(gradient: torch.Tensor, grad_output: torch.Tensor, launches: Launches) -> None:
    """Multiplies the gradient by grad_output in place, one launch. `gradient` is dense, in any order of axes; grad_output 0-d."""
    launch, count = ScaleLaunch(), gradient.numel()
    grid, arguments = (ceil_div(count, launch.block),), (gradient, grad_output, count, launch.block)
    launches.add(scale_kernel[grid](*arguments, num_warps=launch.num_warps, **FUSION), grid, arguments)
