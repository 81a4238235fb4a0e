"""Triton's own host code on a machine without a GPU: its JIT and its launchers run whole, on a driver whose functions do nothing.

`install` must come before anything asks Triton for its driver, in a process of its own: it changes torch.cuda for good. Tensors
stay on the CPU, and what a kernel would write stays unwritten. Needs a C compiler, as Triton does, and no TRITON_INTERPRET.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import subprocess
import tempfile
from unittest import mock

import torch

from masked_loss_triton import backend

MULTIPROCESSORS = 132


def install(*, start: bool = True) -> ctypes.CDLL:
    """Makes Triton believe in an H100. `null_driver_launches()` of the library that is returned counts the launches.

    Args:
        start: let Triton build its host code now, and not when it is first asked for.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is set, and nothing is launched then: start this in a process without it")
    folder = tempfile.mkdtemp(prefix="null_driver_")
    library = pathlib.Path(folder, "libcuda.so.1")
    source = pathlib.Path(__file__).with_suffix(".c")
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, source]
    subprocess.run(command, check=True)
    library.with_name("libcuda.so").symlink_to(library.name)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    driver = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment, misc]
    torch.cuda.set_device = lambda device: None
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    CudaDriver.is_active = staticmethod(lambda: True)
    if start:
        triton.runtime.driver.set_active(CudaDriver())
    # Where `choose` would refuse CPU tensors, and the launchers would choose as for the interpreter.
    from masked_loss_triton.kernels import devices

    mock.patch.object(backend, "choose", lambda name, pred: name).start()
    mock.patch.object(devices, "hardware", return_value=devices.Hardware(MULTIPROCESSORS, overlaps=True)).start()
    return driver
