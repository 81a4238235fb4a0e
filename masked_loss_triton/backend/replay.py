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
    from masked_loss_triton.kernels.sums import Outputs

ALIGNMENT = 16  # bytes: where a tensor does not begin on a multiple of it, Triton compiles a kernel of its own
_PLAIN = (torch.Tensor, torch.nn.Parameter)
Tensors = tuple[torch.Tensor | None, ...]
STREAM, WRITTEN = object(), object()  # placeholders for the stream, and for `Upstream.written`


class Replay:
    """Launches of one call, to be made again.

    They are written out as a function of what changes, and compiled: a tuple of arguments is then built as fast as Python can.

    Args:
        made: the launches. scratch: tensors that pass from one to the next.
        tensors: whose addresses change from call to call, None where there is none.
        values: placeholders in the arguments for what else changes, by the name of a parameter.
        kept: tensors that stay where they are.

    Raises:
        KeyError: a launch takes a tensor that is none of these.
    """

    def __init__(
        self,
        made: Sequence[Launch],
        scratch: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor | None],
        values: dict[str, object],
        kept: Sequence[torch.Tensor] = (),
    ) -> None:
        given = [index for index, x in enumerate(tensors) if x is not None and x.numel() > 0]
        self.given = itemgetter(*given)  # two and more: pred and target
        places = {tensors[index].data_ptr(): f"address_{index}" for index in given}  # type: ignore[union-attr]
        parameters = [*places.values(), "scratch", *values]
        self.bytes = 0
        for tensor in scratch:
            places[tensor.data_ptr()] = f"scratch + {self.bytes}"
            self.bytes += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        places |= {tensor.data_ptr(): str(tensor.data_ptr()) for tensor in kept}
        known: dict[str, object] = {}

        def expression(value: object) -> str:
            """What stands for an argument in the function."""
            if isinstance(value, torch.Tensor):
                return places[value.data_ptr()]
            if isinstance(value, tuple):
                return "".join(("(", *(f"{expression(x)}, " for x in value), ")"))
            if value is None or type(value) in (bool, int):
                return repr(value)
            for name, placeholder in values.items():
                if value is placeholder:
                    return name
            known[f"known_{len(known)}"] = value
            return f"known_{len(known) - 1}"

        lines = [f"def replay({', '.join(parameters)}):"]
        for start, arguments in map(_start, made):
            lines.append(f"    {expression(start)}({', '.join(map(expression, arguments))})")
        exec("\n".join(lines), known)
        self.replay: Callable[..., None] = known["replay"]  # type: ignore[assignment]
        # A kernel that is dropped takes its code off the device, and the address of a tensor that is dropped is another's.
        self.alive = [launch.kernel for launch in made], kept

    def scratch(self, device: torch.device) -> torch.Tensor:
        """Memory for one call."""
        return torch.empty(self.bytes, dtype=torch.uint8, device=device)

    def __call__(self, tensors: Sequence[torch.Tensor | None], scratch: torch.Tensor, *values: object) -> None:
        self.replay(*map(_address, self.given(tensors)), scratch.data_ptr(), *values)


_address = torch.Tensor.data_ptr


def _start(launch: Launch) -> tuple[Callable[..., object], tuple[object, ...]]:
    """(function, its arguments) that start a compiled kernel, on the stream in the place of `STREAM`.

    Triton's launcher in Python asks for scratch memory, which our kernels do not need, and calls its launcher in C. What that one
    is given is taken down here: it differs between versions of Triton, and the way there costs a third of a launch.
    """
    kernel: Any = launch.kernel
    grid = (*launch.grid, 1, 1)[:3]
    given = (*grid, STREAM, kernel.function, kernel.packed_metadata, None, None, None, *launch.arguments)
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
        layout, dim: of pred, as they were given.
    """

    def __init__(self, layout: str, dim: int) -> None:
        self.layout, self.dim = layout, dim
        self.cannot = False  # be repeated: seen, and not to be tried again
        self.repeat: Callable[..., Any] | None = None  # gives the loss of a later call: `repeated` of fused.py
        self.forward: Replay | None = None
        self.backward: Replay | None = None  # None: no gradient is asked for
        self.gradient_strides: tuple[int, ...] | None = None  # None: those that `empty_like` gives
        self.like_loss = torch.empty(0)  # of its form, for `empty_like`, which costs half of what naming the form does
        self.driver: Any = None  # of Triton, and its settings
        self.runtime: Any = None
        self.device = -1

    def keep(
        self,
        launches: Launches,
        call: LossInputs,
        out: Outputs,
        gradient: torch.Tensor | None,
        repeat: Callable[..., Any],
    ) -> None:
        """Keeps the launches of a call with these outputs, and that of its backward."""
        from masked_loss_triton.kernels.upstream import backward_of

        tensors = [*call.tensors, out.loss_ptr, out.stats_ptr, gradient]
        places = [tensor.data_ptr() for tensor in tensors if tensor is not None and tensor.numel()]
        # A prior that is the target: nobody could tell which of them a launch takes.
        if torch.version.hip or launches.made[0].kernel is None or len(set(places)) < len(places):
            return
        import triton

        self.driver, self.runtime = triton.runtime.driver.active, triton.knobs.runtime
        self.device = self.driver.get_current_device()
        backward = None
        try:
            forward = Replay(launches.made, launches.scratch, tensors, {"stream": STREAM}, launches.kept)
            if gradient is not None:
                grad_output = torch.empty_like(out.loss_ptr)
                again = [backward_of(launches.made[-1], grad_output, WRITTEN)]
                tensors = [*call.tensors, gradient, grad_output]
                backward = Replay(
                    again, launches.scratch, tensors, {"stream": STREAM, "written": WRITTEN}, launches.kept
                )
                given = as_given(call.pred, self.layout, self.dim)
                strides = as_given(gradient, self.layout, self.dim).stride()
                # They differ where pred is expanded.
                self.gradient_strides = None if torch.empty_like(given).stride() == strides else strides
        except KeyError:
            self.cannot = True
            return
        self.like_loss = torch.empty_like(out.loss_ptr)
        self.forward, self.backward, self.repeat = forward, backward, repeat

    def empty_gradient(self, pred: torch.Tensor) -> torch.Tensor:
        """Memory for the gradient, as the launches take it."""
        gradient = torch.empty_like(pred)
        return gradient if self.gradient_strides is None else gradient.as_strided(pred.shape, self.gradient_strides)

    def stream(self) -> int | None:
        """The current stream; None where launches must take the whole way: on another device, or watched by a hook of Triton."""
        for hook in (self.runtime.launch_enter_hook, self.runtime.launch_exit_hook):
            if getattr(hook, "calls", hook):  # a chain from Triton 3.5 on, before that a function or None
                return None
        return self.current_stream() if self.driver.get_current_device() == self.device else None

    def current_stream(self) -> int:
        return self.driver.get_current_stream(self.device)


# The innermost hooks of `torch.autograd.graph.saved_tensors_hooks`, or None. Before torch 2.6 one cannot ask: as if watched.
_hooks_of_saved_tensors = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: "perhaps")


@functools.lru_cache(maxsize=256)
def _recording(layout: str, dim: int, *_rest: object) -> Recording:
    return Recording(layout, dim)


def recording_of(tensors: Tensors, layout: str, *options: object) -> Recording | None:
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
        return _recording(layout, tensors[0].dim(), *form)  # type: ignore[union-attr]
    except (RuntimeError, TypeError, AttributeError):
        # No tensor, no strides, or an option that is no option: `describe` says so.
        return None
