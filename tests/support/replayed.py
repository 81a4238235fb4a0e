"""Handles of interpreted kernels, which take addresses as compiled kernels do: a recorded call can then be made again on a CPU."""

import collections
import ctypes

import torch
import triton
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from masked_loss_triton.kernels import loss, weights

KERNELS = {"loss_kernel": loss, "weights_kernel": weights, "resample_kernel": weights}


class Handle:
    """What Triton's JIT would give back: `run` takes addresses where the kernel takes tensors."""

    function = packed_metadata = None

    def __init__(self, kernel, arguments, options, launched):
        self.kernel, self.options, self.launched = kernel, options, launched
        leaves, self.tree = tree_flatten(arguments)
        self.leaves = [_Form(x) if isinstance(x, torch.Tensor) else x for x in leaves]

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        given = list(zip(tree_leaves(arguments), self.leaves, strict=True))
        # Bytes from each address: the interpreter wants one storage where two arguments are one tensor.
        most = collections.Counter()
        for address, form in given:
            if isinstance(form, _Form):
                most[address] = max(most[address], form.bytes)
        assert not any(address % 16 for address in most), (
            "the kernel was compiled for addresses on multiples of 16 bytes"
        )
        leaves = [form.at(x, most[x]) if isinstance(form, _Form) else x for x, form in given]
        self.launched.append(self.kernel.fn.__name__)
        self.kernel[x, y, z](*tree_unflatten(leaves, self.tree), **self.options)


class _Form:
    def __init__(self, tensor):
        self.shape, self.strides, self.dtype = tensor.shape, tensor.stride(), tensor.dtype
        elements = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        self.bytes = elements * self.dtype.itemsize

    def at(self, address, size):
        memory = (ctypes.c_char * size).from_address(address)
        return torch.frombuffer(memory, dtype=self.dtype).as_strided(self.shape, self.strides)


class Recorded:
    """A kernel of which each launch gives a `Handle`."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched, self.arg_names = kernel, launched, kernel.arg_names

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.kernel[grid](*arguments, **options)
            return Handle(self.kernel, arguments, options, self.launched)

        return launch


class Driver:
    """A driver with one device and one stream."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def patch(monkeypatch):
    """Kernels have handles from here on. The names of those that are launched again are put into the list that is returned."""
    launched = []
    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, Recorded(getattr(module, name), launched))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return launched
