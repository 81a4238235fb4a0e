"""How things are measured: time on CUDA and on the CPU; bytes, launches, synchronisations and memory without a GPU.

Counting works on `meta` tensors: shapes without numbers, of any size, whose operations are those that a GPU would be asked for.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Tensor = torch.Tensor

# These start no kernel: they make a view, take memory, or look at a size.
_FREE = {
    "alias", "as_strided", "detach", "detach_", "diagonal", "empty", "empty_like", "empty_strided", "expand", "is_same_size",
    "lift_fresh", "movedim", "narrow", "new_empty", "new_empty_strided", "permute", "resize_", "select", "set_", "slice", "split",
    "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip
# These wait for the device, since they need a number from it.
_WAITS = {"_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "unique", "_unique2"}
# These write without reading what they write to.
_WRITE_ONLY = {"copy_", "fill_", "zero_", "normal_", "uniform_"}


@dataclasses.dataclass
class Counts:
    """What one piece of work asks of a device.

    Args:
        bytes: each operation reads its inputs and writes its outputs once; no cache is assumed between two operations.
        launches: operations that start a kernel; a reduction counts once.
        synchronisations: operations that wait for the device.
        peak: most bytes alive at once beyond what was alive before.
    """

    bytes: int = 0
    launches: int = 0
    synchronisations: int = 0
    peak: int = 0
    operations: list[str] = dataclasses.field(default_factory=list)


class Counting(TorchDispatchMode):
    """Counts every operation below autograd, of forward and backward: `with Counting() as counts: ...`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __enter__(self) -> Counts:  # type: ignore[override]
        super().__enter__()
        return self.counts

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = operation.name().split("::")[1].split(".")[0]
        if name in _WAITS:
            self.counts.synchronisations += 1
            if args[0].device.type == "meta":
                return _answer(name, args[0])
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        before = {_storage(x) for x in inputs}
        result = operation(*args, **kwargs)
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        self._remember([x for x in outputs if _storage(x) not in before])
        if name not in _FREE and name not in _WAITS:
            self._count(name, _bound(operation, args, kwargs), inputs, outputs)
        return result

    def _count(self, name: str, bound: list[Any], read: list[Tensor], written: list[Tensor]) -> None:
        changed = [
            x for schema, x in bound if isinstance(x, Tensor) and schema.alias_info and schema.alias_info.is_write
        ]
        if changed:
            written = changed
            only_written = [x for schema, x in bound if x is not None and schema.is_out]
            if name in _WRITE_ONLY:
                only_written = changed
            read = [x for x in read if all(x is not y for y in only_written)]
        self.counts.launches += 1
        self.counts.bytes += sum(distinct_bytes(x) for x in [*_once(read), *written])
        self.counts.operations.append(name)

    def _remember(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._alive[_storage(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self.counts.peak = max(self.counts.peak, sum(size for _, size in self._alive.values()))


def _bound(operation: Any, args: Any, kwargs: Any) -> list[tuple[Any, Any]]:
    """(schema, value) of each argument."""
    schemas = operation._schema.arguments
    return [*zip(schemas, args, strict=False), *((schema, kwargs.get(schema.name)) for schema in schemas[len(args) :])]


def _answer(name: str, of: Tensor) -> Any:
    """A meta tensor has no numbers: True and 1 take the path of a finite loss and a plain backward."""
    if name == "is_nonzero":
        return True
    return bool(1) if of.dtype == torch.bool else 1.0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _once(tensors: list[Tensor]) -> list[Tensor]:
    """x * x reads x once."""
    kept: list[Tensor] = []
    for tensor in tensors:
        same = (_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
        if all(same != (_storage(x), x.storage_offset(), x.shape, x.stride()) for x in kept):
            kept.append(tensor)
    return kept


def distinct_bytes(tensor: Tensor) -> int:
    """Bytes behind a tensor: an expanded axis is read once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= 1 if stride == 0 else size
    return elements * tensor.element_size()


def peak_memory(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes alive at once during `work` beyond those before it: the allocator's own count on CUDA, else `Counting`'s."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with Counting() as counts:
        work()
    return counts.peak


# Bytes written between two runs on CUDA, more than any second-level cache holds: inputs then come from memory, as after a model.
FLUSH = 256 * 2**20


def seconds(
    work: Callable[..., Any], device: torch.device, rounds: int = 20, setup: Callable[[], Any] | None = None
) -> list[float]:
    """Time of `work(setup())` in each round, without the setup; on CUDA by events and with a cold second-level cache."""
    arguments: list[Any] = [] if setup is None else [None]

    def prepare() -> None:
        if setup is not None:
            arguments[0] = setup()

    for _ in range(3):
        prepare()
        work(*arguments)
    if device.type != "cuda":
        times = []
        for _ in range(rounds):
            prepare()
            start = time.perf_counter()
            work(*arguments)
            times.append(time.perf_counter() - start)
        return times
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(rounds)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        prepare()
        flush.zero_()
        # A millisecond of the device, in which the host queues the work: no gaps are measured.
        torch.cuda._sleep(2_000_000)
        start.record()
        work(*arguments)
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]
