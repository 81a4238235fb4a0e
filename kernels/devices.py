"""What the launchers ask a device."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from masked_loss_triton.backend import interpreter_is_on


class Hardware(NamedTuple):
    """What decides about launches.

    Args:
        overlaps: a kernel may be started before the one before it has ended, and wait on the device for what that one writes
            (programmatic dependent launch, from sm_90 on).
    """

    multiprocessors: int
    overlaps: bool = False

    def options(self) -> dict[str, bool]:
        """Options of a launch that may begin early."""
        return dict(launch_pdl=True) if self.overlaps else {}  # a word that only CUDA's backend of Triton knows


@functools.lru_cache(maxsize=16)
def hardware(device: torch.device) -> Hardware:
    """Of the device; MASKED_LOSS_OVERLAP=0 in the environment lets each kernel begin when the one before it has ended."""
    if device.type != "cuda" or interpreter_is_on():
        return Hardware(4)  # few, but enough that small inputs take the path that splits the channels
    properties = torch.cuda.get_device_properties(device)
    overlaps = not torch.version.hip and properties.major >= 9 and os.environ.get("MASKED_LOSS_OVERLAP") != "0"
    # Older drivers cannot capture such a launch in a graph.
    return Hardware(properties.multi_processor_count, overlaps and _driver_version() >= 12030)


def _driver_version() -> int:
    """12030 for CUDA 12.3; 0 where nobody says."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuDriverGetVersion(
            ctypes.byref(version)
        )
    except (OSError, AttributeError):
        return 0
    return version.value


# Triton's own words for the two fail in 3.4. Without the clobber LLVM could move an access of memory past them.


@triton.jit
def let_next_begin():
    """The next kernel may be started from here on. What this one writes, that one sees once its `wait_for_last` has returned."""
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_last():
    """Waits for the end of the kernel before, and sees all that it has written."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r,~{memory}", [], dtype=tl.int32, is_pure=False, pack=1)
