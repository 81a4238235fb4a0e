"""The kernel launches of one call, taken down instead of run: for the tools that look at the code with no GPU.

The launchers of masked_loss_triton run unchanged on CPU tensors while `JITFunction.run` is replaced; what they would have started
is compiled for any target exactly as the JIT would specialise it (integers that are 1 or multiples of 16, aligned pointers, on
AMD tensors below 2 GiB). Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError(
        "TRITON_INTERPRET is set, and no kernel can be compiled then: start this in a process without it"
    )

import torch
import triton
from torch.utils._pytree import tree_leaves
from triton._utils import find_paths_if, get_iterable_path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from bench.cases import Call
from masked_loss_triton.backend import fused
from masked_loss_triton.call import describe
from masked_loss_triton.kernels import devices
from masked_loss_triton.kernels.devices import Hardware


@dataclasses.dataclass(frozen=True)
class Device:
    """What decides about the compiled code and its occupancy, of one GPU of an architecture."""

    name: str
    target: GPUTarget
    multiprocessors: int
    warps: int  # resident per multiprocessor; AMD: waves per SIMD
    blocks: int  # resident per multiprocessor
    shared_memory: int  # bytes per multiprocessor that blocks can take

    @property
    def hardware(self) -> Hardware:
        return Hardware(self.multiprocessors, self.target.backend == "cuda" and int(self.target.arch) >= 90)


DEVICES = {
    "sm_80": Device("A100", GPUTarget("cuda", 80, 32), 108, 64, 32, 164 * 1024),
    "sm_90": Device("H100", GPUTarget("cuda", 90, 32), 132, 64, 32, 228 * 1024),
    "sm_100": Device("B200", GPUTarget("cuda", 100, 32), 148, 64, 32, 228 * 1024),
    "sm_120": Device("RTX 5090", GPUTarget("cuda", 120, 32), 170, 48, 24, 100 * 1024),
    "gfx942": Device("MI300X", GPUTarget("hip", "gfx942", 64), 304, 8, 16, 64 * 1024),
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One `kernel[grid](...)`: the kernel, its arguments by name, options such as num_warps."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def is_backward(self) -> bool:
        """The loss kernel again, which returns at once where grad_output is what the forward expected."""
        return self.name == "loss_kernel" and self.arguments["upstream"].written != 0

    @functools.cached_property
    def leaves(self) -> dict[str, Any]:
        """Every argument by its own name, those inside of bundles too: `pred.ptr` is "pred", `weights.w_ptr` is "w"."""
        return dict(_leaves("", self.arguments))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: leaf for name, leaf in self.leaves.items() if isinstance(leaf, torch.Tensor)}

    def compile(self, target: GPUTarget) -> Any:
        """The compiled kernel for a target, specialised as the JIT would for these arguments."""
        packed, signature, constants, attributes = self._specialised(target)
        key = (self.kernel.cache_key, repr((signature, constants, attributes, packed, target)))
        if key not in _compiled:
            source = ASTSource(self.kernel, signature, constants, attributes)
            _compiled[key] = triton.compile(source, target=target, options=packed.__dict__)
        return _compiled[key]

    def specialization(self, target: GPUTarget) -> str:
        """What the JIT compiles a kernel for: launches with the same text share one."""
        packed, signature, constants, attributes = self._specialised(target)
        return repr((self.name, signature, constants, attributes, packed))

    def passed(self, target: GPUTarget) -> dict[str, Any]:
        """The leaves that are passed to the compiled kernel, and are not constants of its code."""
        kinds = tree_leaves(list(self._specialised(target)[1].values()))
        return {
            name: leaf for (name, leaf), kind in zip(self.leaves.items(), kinds, strict=True) if kind != "constexpr"
        }

    def _specialised(self, target: GPUTarget) -> tuple[Any, ...]:
        """(options, signature, constants, attributes)."""
        backend = make_backend(target)
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        keywords = dict(self.options, debug=False)
        if target.backend != "cuda":
            keywords.pop("maxnreg", None)  # as the launchers leave it out there
        if target.warp_size == 64 and "num_warps" in keywords:
            keywords["num_warps"] //= 2  # as `warps` has it there
        bound, specialization, _ = bind(**self.arguments, **keywords)
        # Private names, but the only way to follow the JIT; these are the same from Triton 3.4 to 3.9.
        kinds = [kind for kind, *_ in specialization]
        hints = ["" if kind == "constexpr" else hint for kind, hint in specialization]
        values = list(bound.values())
        constants = {path: get_iterable_path(values, path) for path in find_paths_if(kinds, _is_constant)}
        attributes = {
            path: backend.parse_attr(get_iterable_path(hints, path)) for path in find_paths_if(hints, _is_hint)
        }
        signature = dict(zip(self.kernel.arg_names, kinds, strict=True))
        return backend.parse_options(keywords), signature, constants, attributes


def _is_constant(_path: Any, kind: Any) -> bool:
    return isinstance(kind, str) and kind == "constexpr"


def _is_hint(_path: Any, hint: Any) -> bool:
    return isinstance(hint, str)


# Triton's own cache would return code whose line numbers are those of an older file: its key is the text of the function.
triton.knobs.compilation.always_compile = True
_compiled: dict[Any, Any] = {}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    elif isinstance(value, tuple):
        value = {f"{name}[{index}]": item for index, item in enumerate(value)}
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        pointer = isinstance(item, torch.Tensor)
        yield from _leaves(
            (name if key == "ptr" else key.removesuffix("_ptr")) if pointer else f"{name}.{key}".strip("."), item
        )


def _detached(value: Any) -> Any:
    """Makes aliases: autograd copies a gradient instead of giving it away while somebody else holds the same tensor."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if hasattr(value, "_make"):
        return value._make(map(_detached, value))
    return value


def on(hardware: Hardware) -> contextlib.AbstractContextManager[Any]:
    """The launchers choose as on this hardware, and not as for a CPU tensor."""
    return mock.patch.object(devices, "hardware", return_value=hardware)


@contextlib.contextmanager
def recorded(run: Any = None) -> Iterator[list[Launch]]:
    """Collects the launches made inside; `run(launch)` may execute each. Without it outputs stay uninitialised."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **keywords: Any) -> None:
        names = [parameter.name for parameter in self.params]
        arguments = {parameter.name: parameter.default for parameter in self.params if parameter.has_default}
        arguments |= dict(zip(names, args, strict=False))
        arguments |= {name: value for name, value in keywords.items() if name in names}
        arguments = {name: _detached(value) for name, value in arguments.items()}
        options = {name: value for name, value in keywords.items() if name not in names}
        size = grid(arguments) if callable(grid) else grid
        launches.append(Launch(self, tuple(size), arguments, options))
        if run is not None:
            run(launches[-1])

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def fused_loss(call: Call, *, stats: bool = False) -> torch.Tensor:
    """The loss on the triton backend whatever the device: `masked_loss` would refuse CPU tensors outside the interpreter."""
    inputs = describe(call.pred, call.target, call.mask, call.config, layout=call.layout, **call.keywords)
    return fused.loss(inputs, call.config, stats)[0]


def launches_of(call: Call, hardware: Hardware, *, stats: bool = False, backward: bool = True) -> list[Launch]:
    """Every launch of forward and backward on this hardware."""
    with on(hardware), recorded() as launches:
        loss = fused_loss(call, stats=stats)
        if backward:
            loss.backward()
    return launches
