"""grad_output, foreseen: what autograd will multiply the loss's gradient by, before it says so.

The forward multiplies the gradient by what the last backward was given, before it is rounded to the dtype of pred. The backward
is the same launch with the real number: where that was foreseen, it returns at once, on the device; else it computes the gradient
again. The result is the same either way (0 and -0 count as one), nobody waits for a number, and accumulation or a loss scale
costs no pass over memory.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes

from masked_loss_triton.kernels.launches import Launch, Launches
from masked_loss_triton.kernels.sums import Outputs

if TYPE_CHECKING:
    from masked_loss_triton.config import MaskedLossConfig

# Numbers kept for each device. They are never freed: a launch on another stream may still write one.
SLOTS = 64


class Upstream(NamedTuple):
    """What the gradient is multiplied by. Without pointers 1; the operators of torch.compile give `grad_output_ptr` alone.

    Args:
        grad_output_ptr: () float32; in the forward that is `expected_ptr`.
        last_ptr: its first element, float32, outlives the call: what the last backward was given.
        expected_ptr: () float32, of this call: a copy, since another stream may write `last` meanwhile.
        written: 1.0: the gradient in memory has been multiplied by what was expected. No bool: True would be a kernel of its own.
    """

    grad_output_ptr: torch.Tensor | None = None
    last_ptr: torch.Tensor | None = None
    expected_ptr: torch.Tensor | None = None
    written: float = 0.0

    @classmethod
    def foreseen(cls, config: MaskedLossConfig, device: torch.device, launches: Launches) -> Upstream:
        """Of a forward."""
        expected, last = launches.empty((), device), last_grad_output(device, config)
        launches.kept.append(last)
        return cls(expected, last, expected, 0.0)


ONE = Upstream()


@functools.cache
def _slots(device: torch.device) -> tuple[torch.Tensor, ...]:
    with _disable_current_modes():  # the first call may be one under a mode that fakes tensors
        # 16 bytes for each: a pointer off that alignment would make kernels of its own.
        return torch.ones(SLOTS, 4, dtype=torch.float32, device=device).unbind()


def last_grad_output(device: torch.device, config: MaskedLossConfig) -> torch.Tensor:
    """Where the last grad_output of losses with this config is kept, in the first of four elements; 1 at first.

    Two configs may share a place: what is foreseen decides about speed alone.
    """
    return _slots(device)[hash(config) % SLOTS]


def backward_of(launch: Launch, grad_output: torch.Tensor, written: object) -> Launch:
    """The backward of a loss that a launch has written together with its gradient. No memory is needed but what the launch had."""

    def changed(argument: object) -> object:
        if isinstance(argument, Upstream):
            return argument._replace(grad_output_ptr=grad_output, written=written)  # type: ignore[arg-type]
        if isinstance(argument, Outputs):
            return argument.of_backward()
        return argument

    return launch._replace(arguments=tuple(map(changed, launch.arguments)))


@triton.jit
def nothing_to_do(upstream, grad_output):
    """Whether the gradient in memory has been multiplied by this grad_output. If not, the next forward will expect it.

    Only the first backward of a loss takes it down: later ones, and the forward, know of nothing that was written.
    """
    if upstream.expected_ptr is not None:
        foreseen = grad_output == tl.load(upstream.expected_ptr)
        written = upstream.written != 0.0
        first_program = (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0)
        tl.store(upstream.last_ptr, grad_output, mask=written & (foreseen == 0) & first_program)
        return written & foreseen
    else:
        return False
