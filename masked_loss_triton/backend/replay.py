"""A call of a form that was seen before: the kernels of the first one, launched again with other addresses.

The first call takes the whole way: every check, the plans, Triton's own search for the compiled kernel. All of it follows from the
form of the call: how each tensor lies in memory, the config, what is asked for. So its launches are kept with its form, and the
next call of that form only fills in where its tensors are. Nothing else may decide about a launch; what is rare has no form and is
never kept. Nothing is kept where Triton interprets, nor on AMD, where a launch also depends on the size of the storage.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from masked_loss_triton.backend.layout import as_given
from masked_loss_triton.call import LossInputs

if TYPE_CHECKING:
    from masked_loss_triton.kernels.launches import Launches

ALIGNMENT = 16  # bytes: where a tensor does not begin on a multiple of it, Triton compiles a kernel of its own
_PLAIN = (torch.Tensor, torch.nn.Parameter)
Tensors = tuple[torch.Tensor | None, ...]


class Replay:
    """The launches of one call, to be made again.

    Args:
        launches: of that call.
        tensors: whose addresses change from call to call, None where there is none.

    Raises:
        KeyError: a launch takes a tensor that is neither of `tensors` nor scratch.
    """

    def __init__(self, launches: Launches, tensors: Sequence[torch.Tensor | None]) -> None:
        given = [x is not None and x.numel() > 0 for x in tensors]
        self.given = tuple(index for index, there in enumerate(given) if there)
        known = [*(tensors[index] for index in self.given), *launches.scratch]
        numbers = {x.data_ptr(): index for index, x in enumerate(known) if x is not None}
        self.offsets: list[int] = []
        self.bytes = 0
        for tensor in launches.scratch:
            self.offsets.append(self.bytes)
            self.bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        # The arguments are made of a row of values: addresses, constants, and the bundles of these, in this order.
        constants: list[object] = []

        def place(value: object) -> int:
            if isinstance(value, torch.Tensor):
                return numbers[value.data_ptr()]
            if any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
                raise KeyError("a bundle inside of a bundle")
            constants.append(value)
            return len(known) + len(constants) - 1

        def places(value: object) -> int | tuple[int, ...]:
            if isinstance(value, tuple) and any(isinstance(item, torch.Tensor) for item in value):
                return tuple(map(place, value))
            return place(value)

        arguments = [list(map(places, launch.arguments)) for launch in launches.made]
        bundles = [item for row in arguments for item in row if isinstance(item, tuple)]
        ahead = itertools.count(len(known) + len(constants))
        orders = [[next(ahead) if isinstance(item, tuple) else item for item in row] for row in arguments]
        self.constants = tuple(constants)
        self.bundles = [itemgetter(*bundle) for bundle in bundles]
        # A kernel that is dropped takes its code off the device.
        self.kernels = [launch.kernel for launch in launches.made]
        self.launches = [
            (kernel.run, (*grid, 1, 1)[:3], (kernel.function, kernel.packed_metadata), itemgetter(*order))
            for (kernel, grid, _), order in zip(launches.made, orders, strict=True)
            if kernel is not None
        ]

    def __call__(self, tensors: Sequence[torch.Tensor | None], device: torch.device, stream: int) -> None:
        addresses = [tensors[index].data_ptr() for index in self.given]  # type: ignore[union-attr]
        if self.offsets:
            scratch = torch.empty(self.bytes, dtype=torch.uint8, device=device)
            start = scratch.data_ptr()
            addresses += [start + offset for offset in self.offsets]
        values = (*addresses, *self.constants)
        values += tuple([bundle(values) for bundle in self.bundles])
        for run, grid, handle, arguments in self.launches:
            run(*grid, stream, *handle, None, None, None, *arguments(values))


class Recording:
    """What is kept of one form of call; nothing before its first call, or where it cannot be repeated.

    Args:
        layout, dim: of pred, as they were given. prior_number: the weight of the prior that the call gave as a number.
    """

    def __init__(self, layout: str, dim: int, prior_number: float | None) -> None:
        self.layout, self.dim, self.prior_number = layout, dim, prior_number
        self.cannot = False  # be repeated: seen, and not to be tried again
        self.repeat: Callable[..., Any] | None = None  # gives the loss of a later call: `repeated` of fused.py
        self.forward: Replay | None = None
        self.backward: Replay | None = None
        self.gradient_strides: tuple[int, ...] | None = None
        self.driver: Any = None  # of Triton, and its settings
        self.runtime: Any = None
        self.device = -1

    def keep_forward(
        self, launches: Launches, call: LossInputs, outputs: tuple[torch.Tensor, ...], repeat: Callable[..., Any]
    ) -> None:
        """Keeps the launches of a call with these outputs: loss, stats and gradient, the last two empty where not asked for."""
        gradient = outputs[2]
        kept = self._replay(launches, [*call.tensors, *outputs])
        if kept is None:
            return
        self.gradient_strides = as_given(gradient, self.layout, self.dim).stride() if gradient.numel() else None
        self.forward, self.repeat = kept, repeat

    def keep_backward(self, launches: Launches, gradient: torch.Tensor, grad_output: torch.Tensor) -> None:
        """Keeps the launch that scales a gradient."""
        if not grad_output.data_ptr() % ALIGNMENT:
            self.backward = self._replay(launches, [gradient, grad_output])

    def _replay(self, launches: Launches, tensors: list[torch.Tensor | None]) -> Replay | None:
        if torch.version.hip or any(launch.kernel is None for launch in launches.made):
            return None
        places = [tensor.data_ptr() for tensor in tensors if tensor is not None and tensor.numel()]
        if len(set(places)) < len(places):  # a prior that is the target: nobody could tell which of them a launch takes
            return None
        import triton

        self.driver, self.runtime = triton.runtime.driver.active, triton.knobs.runtime
        self.device = self.driver.get_current_device()
        try:
            return Replay(launches, tensors)
        except KeyError:
            self.cannot = True
            return None

    def stream(self) -> int | None:
        """The current stream; None where launches must take the whole way: on another device, or watched by a hook of Triton."""
        for hook in (self.runtime.launch_enter_hook, self.runtime.launch_exit_hook):
            if getattr(hook, "calls", hook):  # a chain from Triton 3.5 on, before that a function or None
                return None
        if self.driver.get_current_device() != self.device:
            return None
        return self.driver.get_current_stream(self.device)


# The innermost hooks of `torch.autograd.graph.saved_tensors_hooks`, or None. Before torch 2.6 one cannot ask: as if watched.
_hooks_of_saved_tensors = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: "perhaps")


@functools.lru_cache(maxsize=256)
def _recording(layout: str, dim: int, prior_number: float | None, *_rest: object) -> Recording:
    return Recording(layout, dim, prior_number)


def recording_of(
    tensors: Tensors, layout: str, prior_number: float | None = None, *options: object
) -> Recording | None:
    """What is kept of calls of this form; None for what has no form: traced or faked, watched by a mode or by hooks of saved
    tensors (a checkpoint compares what its two passes save), under torch.func, with tangents, or wrong."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return None
    if torch._C._len_torch_dispatch_stack() or _hooks_of_saved_tensors(True) is not None:
        return None
    form: list[object] = [torch.is_grad_enabled(), *options]
    try:
        for x in tensors:
            if x is None:
                form.append(None)
            elif type(x) in _PLAIN and not x.is_neg():
                form += x.shape, x.stride(), x.dtype, x.device, x.requires_grad, x.data_ptr() % ALIGNMENT
            else:
                return None
        return _recording(layout, tensors[0].dim(), prior_number, *form)  # type: ignore[union-attr]
    except (RuntimeError, TypeError, AttributeError):
        # No tensor, no strides, or an option that is no option: `describe` says so.
        return None
