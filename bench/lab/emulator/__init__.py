"""Executes the code that Triton compiles for an AMD GPU (gfx1100), instruction by instruction, on CPU tensors.

`machine.run(compiled, grid, arguments)` counts bytes, sectors and instructions, and raises `OutOfBounds` before an access outside
the tensors happens. It has no clock, no caches and no concurrency: it shows numbers, bounds and traffic, not speed and no races.
About 10^5 wave instructions a second. Needs clang, and TINYGRAD set to a checkout of tinygrad, whose tests hold the model of the
instructions; where that model errs on what Triton emits, instructions.py has replacements, and `selfcheck` tries them.
"""

from __future__ import annotations

import os
import shutil

VARIABLE = "TINYGRAD"


def why_unavailable() -> str | None:
    """None, or why the emulator cannot be used here."""
    if not os.path.isfile(os.path.join(os.environ.get(VARIABLE, ""), "test", "mockgpu", "amd", "emu.py")):
        return f"set {VARIABLE} to a checkout of tinygrad"
    return None if shutil.which("clang") else "install clang"
