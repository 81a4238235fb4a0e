"""tinygrad's model of the instructions of an RDNA3 GPU, imported from the checkout that TINYGRAD names."""

from __future__ import annotations

import os
import sys

from bench.lab.emulator import VARIABLE, why_unavailable

if reason := why_unavailable():
    raise RuntimeError(f"no emulator: {reason}")
os.environ.setdefault("DEV", "CPU")  # tinygrad compiles each instruction for this device
sys.path.insert(0, os.environ[VARIABLE])

from test.mockgpu.amd import emu
from tinygrad.device import Buffer, BufferSpec
from tinygrad.dtype import dtypes
from tinygrad.renderer.amd import decode_inst
from tinygrad.runtime.autogen.amdgpu_kd import llvm_amdhsa_kernel_descriptor_t as KernelDescriptor
from tinygrad.runtime.support.elf import elf_loader

__all__ = ["Buffer", "BufferSpec", "KernelDescriptor", "decode_inst", "dtypes", "elf_loader", "emu"]

ARCHITECTURE = "rdna3"
LANES = 32
EXEC, PC = 126, 256  # where the model keeps the mask of active lanes and the program counter among the scalar registers
