"""A call of a form that was seen before: the kernels of the first one, launched again with other addresses.

The first call takes the whole way: every check, the plans, Triton's own search for the compiled kernel. All of it follows from the
form of the call: how each tensor lies in memory, the config, what is asked for. So its launches are kept with its form, and the
next call of that form only fills in where its tensors are. Nothing else may decide about a launch; what is rare has no form and is
never kept. Nothing is kept where Triton interprets, nor on AMD, where a launch also depends on the size of the storage.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from masked_loss_triton.backend.layout import as_given
from masked_loss_triton.call import LossInputs

if TYPE_CHECKING:
    from masked_loss_triton.kernels.launches import Launch, Launches

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
        # A launch takes its arguments from one row of values: addresses, the stream, constants, and tuples of what stands before.
        stream, last = object(), len(known)
        constants: list[object] = []

        def places(value: object) -> int | list[Any]:
            """Where a value stands in the row; of a tuple in which something changes, where each of its own values does."""
            if value is stream:
                return last
            if isinstance(value, torch.Tensor):
                return numbers[value.data_ptr()]
            if isinstance(value, tuple):
                before, inside = len(constants), list(map(places, value))
                if any(isinstance(place, list) or place <= last for place in inside):
                    return inside
                del constants[before:]
            constants.append(value)
            return last + len(constants)

        starts = [_start(launch, stream) for launch in launches.made]
        wanted: list[Any] = [places(arguments) for _, arguments in starts]
        self.constants = tuple(constants)
        self.tuples: list[Callable[[Sequence[Any]], tuple[Any, ...]]] = []

        def picker(inside: list[Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
            order = [place_of(place) if isinstance(place, list) else place for place in inside]
            return itemgetter(*order) if len(order) > 1 else lambda row: (row[order[0]],)

        def place_of(inside: list[Any]) -> int:
            self.tuples.append(picker(inside))
            return last + len(constants) + len(self.tuples)

        self.calls = [(start, picker(row)) for (start, _), row in zip(starts, wanted, strict=True)]
        # A kernel that is dropped takes its code off the device.
        self.kernels = [launch.kernel for launch in launches.made]

    def __call__(self, tensors: Sequence[torch.Tensor | None], device: torch.device, stream: int) -> None:
        row: list[Any] = [tensors[index].data_ptr() for index in self.given]  # type: ignore[union-attr]
        if self.offsets:
            scratch = torch.empty(self.bytes, dtype=torch.uint8, device=device)
            first = scratch.data_ptr()
            row += [first + offset for offset in self.offsets]
        row.append(stream)
        row += self.constants
        for values in self.tuples:
            row.append(values(row))
        for start, arguments in self.calls:
            start(*arguments(row))


def _start(launch: Launch, stream: object) -> tuple[Callable[..., object], tuple[object, ...]]:
    """(function, its arguments) that start a compiled kernel on a stream.

    Triton's launcher in Python asks for scratch memory, which our kernels do not need, and calls its launcher in C. What that one
    is given is taken down here: it differs between versions of Triton, and the way there costs a third of a launch.
    """
    kernel: Any = launch.kernel
    grid = (*launch.grid, 1, 1)[:3]
    given = (*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *launch.arguments)
    launcher = kernel.run
    more = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")
    if not hasattr(launcher, "launch") or any(getattr(launcher, name, 0) for name in more):
        return launcher, given
    taken: list[tuple[object, ...]] = []
    twin = copy.copy(launcher)  # another thread may be launching this kernel
    twin.launch = lambda *arguments: taken.append(arguments)
    twin(*given)
    return launcher.launch, taken[0]


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
        self.like_loss = torch.empty(0)  # of its form, for `empty_like`, which costs half of what naming the form does
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
        self.like_loss = torch.empty_like(outputs[0])
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
