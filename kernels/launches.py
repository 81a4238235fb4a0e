"""What one call has started: its kernels, and the memory that nobody else uses. A later call of the same form starts it again."""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.compiler import CompiledKernel

# Said at each launch: Triton 3.9 warns where it is not, and 3.10 will leave it out.
FUSION = {"enable_fp_fusion": True}


class Launch(NamedTuple):
    """One launch: the compiled kernel (None from the interpreter), its grid, and its arguments, all of them by position."""

    kernel: CompiledKernel | None
    grid: tuple[int, ...]
    arguments: tuple[object, ...]


class Launches:
    """The launches of one call in their order, and the tensors that pass from one kernel to the next and are then forgotten."""

    def __init__(self) -> None:
        self.made: list[Launch] = []
        self.scratch: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []  # what outlives the call, and stays where it is

    def add(self, kernel: CompiledKernel | None, grid: tuple[int, ...], arguments: tuple[object, ...]) -> None:
        self.made.append(Launch(kernel, grid, arguments))

    def empty(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Memory that a kernel writes before another reads it, and whose contents nobody asks for after the call."""
        self.scratch.append(torch.empty(shape, dtype=dtype, device=device))
        return self.scratch[-1]
