"""Runs a grid of an emulated kernel: arguments, work groups, waves, and the count of what they do."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.lab.emulator import instructions
from bench.lab.emulator.code import CodeObject
from bench.lab.emulator.instructions import Plain, Wave
from bench.lab.emulator.memory import Memory, Traffic
from bench.lab.emulator.model import ARCHITECTURE, LANES, Buffer, BufferSpec, dtypes, emu

MOST_INSTRUCTIONS = 20_000_000  # of one launch: a loop that never ends is an error


@dataclasses.dataclass
class Step:
    """One instruction, ready to be executed again and again."""

    execute: Plain
    is_barrier: bool = False
    access: Callable[[Wave], None] | None = None  # counts what it asks memory for, before it does


@dataclasses.dataclass
class Counted:
    """What a launch did. instructions: of waves."""

    instructions: int
    traffic: dict[str, Traffic]


def run(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> Counted:
    """Executes a kernel that Triton compiled for gfx1100, on CPU tensors, in place.

    Args:
        kernel: what `triton.compile` returned.
        arguments: by name, every argument that is not a constant of the compiled code, in the order of its parameters.

    Raises:
        OutOfBounds: before an access outside the tensors happens.
    """
    return Machine(kernel, arguments).run((*grid, *(1,) * (3 - len(grid))))


class Machine:
    """One kernel with its arguments."""

    def __init__(self, kernel: Any, arguments: dict[str, Any]) -> None:
        self.code = CodeObject(kernel)
        self.metadata = kernel.metadata
        assert self.metadata.warp_size == LANES
        self.memory = Memory({name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)})
        self.values = list(arguments.values())
        self.steps: dict[int, Step] = {}
        self.executed = 0
        shared = max(self.metadata.shared, self.code.descriptor.group_segment_fixed_size)
        self.shared = Buffer("CPU", max(shared // 4, 1) + 4, dtypes.uint32).ensure_allocated()
        self.resources = self.code.descriptor.compute_pgm_rsrc2 | ((shared + 511) // 512 << 15)
        self._all_memory = Buffer("CPU", 1 << 40, dtypes.uint32, options=BufferSpec(external_ptr=0)).ensure_allocated()

    def run(self, grid: tuple[int, ...]) -> Counted:
        place = self._placed_arguments(grid)
        for z, y, x in itertools.product(*map(range, reversed(grid))):
            self._run_group(place, x, y, z)
        return Counted(self.executed, self.memory.traffic())

    def _placed_arguments(self, grid: tuple[int, ...]) -> int:
        """Places the arguments and returns their address, laid out as the code's metadata say."""
        described = self.code.arguments
        slots = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)", described)
        block = bytearray(self.code.descriptor.kernarg_size)
        assert len(slots) >= len(self.values), f"{len(self.values)} arguments, and places for {len(slots)}"
        for (offset, size), value in zip(slots, self.values, strict=False):
            block[int(offset) : int(offset) + int(size)] = _as_bytes(value, int(size))
        threads = self.metadata.num_warps * LANES
        hidden = {f"hidden_block_count_{axis}": size for axis, size in zip("xyz", grid, strict=True)}
        hidden |= dict(hidden_group_size_x=threads, hidden_group_size_y=1, hidden_group_size_z=1, hidden_grid_dims=3)
        hidden["hidden_dynamic_lds_size"] = self.metadata.shared
        for offset, size, kind in re.findall(
            r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(hidden_\w+)", described
        ):
            block[int(offset) : int(offset) + int(size)] = _as_bytes(hidden.get(kind, 0), int(size))
        self._arguments = ctypes.create_string_buffer(len(block) + 64)
        place = (ctypes.addressof(self._arguments) + 63) & ~63
        ctypes.memmove(place, bytes(block), len(block))
        return place

    def _run_group(self, place: int, x: int, y: int, z: int) -> None:
        """Runs one work group: a wave runs to a barrier or to its end, then the next."""
        ctypes.memset(self.shared._buf.va_addr, 0, self.shared.nbytes)
        threads = self.metadata.num_warps * LANES
        waves = [self._wave(place, first, threads, (x, y, z)) for first in range(0, threads, LANES)]
        while any(not wave.finished for wave in waves):
            for wave in waves:
                if not wave.finished:
                    self._run_to_barrier(wave)

    def _wave(self, place: int, first: int, threads: int, group: tuple[int, int, int]) -> Wave:
        size = self.code.descriptor.private_segment_fixed_size
        scratch = Buffer("CPU", size * LANES, dtypes.uint8).ensure_allocated() if size else None
        entry, user = self.code.base + self.code.entry, [place & 0xFFFFFFFF, place >> 32]
        state = emu._init_wave(
            entry, first, threads, threads, 1, 1, place, self.resources, size, ARCHITECTURE, *group, user, LANES
        )
        addresses = [
            state.sgpr_buf._buf.va_addr, state.vgpr_buf._buf.va_addr, 0, self.shared._buf.va_addr,
            scratch._buf.va_addr if scratch else 0, state.accvgpr_buf._buf.va_addr,
        ]  # fmt: skip
        vector, scalar = (np.frombuffer(view, np.uint32) for view in (state._vgpr_mv, state._sgpr_mv))
        return Wave(state, [ctypes.c_uint64(address) for address in addresses], vector, scalar, scratch)

    def _run_to_barrier(self, wave: Wave) -> None:
        counter = wave.state._sgpr_mv
        while True:
            at = counter[256] | (counter[257] << 32)
            if at == emu.ENDPGM_PC:
                wave.finished = True
                return
            step = self.steps.get(at)
            if step is None:
                step = self.steps[at] = self._step(at)
            if step.access is not None:
                step.access(wave)
            self.executed += 1
            if self.executed > MOST_INSTRUCTIONS:
                raise RuntimeError(f"more than {MOST_INSTRUCTIONS:,} instructions in one launch")
            step.execute(wave)
            if step.is_barrier:
                return

    def _step(self, at: int) -> Step:
        """The instruction at an address."""
        kind, *special = self.code.special.get(at - self.code.base, ("",))
        place = f"source line {self.code.lines.get(at - self.code.base)}"
        if kind == "buffer":
            return Step(instructions.buffer_access(*special, self.memory, place))
        if kind == "swizzle":
            return Step(instructions.swizzle(*special))
        (program, runtime), decoded = emu._decode_at(at, ARCHITECTURE)
        function, wanted = runtime.fxn, program.arg.globals

        def plain(wave: Wave) -> None:
            function(*[wave.buffers[index] for index in wanted])

        name = emu._op_name(decoded)
        if kind == "dpp":
            return Step(instructions.dpp(plain, *special))
        if re.match(r"V_PERMLANEX?16_B32", name):
            return Step(instructions.permute_lanes(at, decoded.size(), "X16" in name))
        if re.match(r"DS_LOAD_\w+_D16", name):
            return Step(instructions.half_load(plain, decoded.vdst.offset & 255, name.endswith("_HI")))
        is_barrier = isinstance(decoded, emu.ir3.SOPP) and decoded.op in emu._BARRIER_OPS
        is_access = type(decoded).__name__.startswith(("GLOBAL", "FLAT"))
        return Step(plain, is_barrier, self._access(decoded, name, place) if is_access else None)

    def _access(self, decoded: Any, name: str, place: str) -> Callable[[Wave], None]:
        """Counts a global access: its address is a vector pair, or a scalar pair and a vector of offsets."""
        width, is_store = instructions.width_of(name), "STORE" in name
        offset = int(getattr(decoded, "offset", 0) or 0)
        if offset >= 1 << 12:
            offset -= 1 << 13
        vector = (decoded.vaddr if hasattr(decoded, "vaddr") else decoded.addr).offset - 256
        scalar = getattr(getattr(decoded, "saddr", None), "offset", 999)

        def count(wave: Wave) -> None:
            active = wave.active
            addresses = wave.register(vector).astype(np.int64) + offset
            if scalar < 124:
                addresses += wave.pair(scalar)
            else:
                addresses += wave.register(vector + 1).astype(np.int64) << 32
            if active.any():
                self.memory.record(addresses[active], width, is_store, place)

        return count


def _as_bytes(value: Any, size: int) -> bytes:
    if isinstance(value, torch.Tensor):
        assert value.device.type == "cpu", f"a tensor on {value.device}"
        return struct.pack("<Q", value.data_ptr())
    if isinstance(value, float):
        return struct.pack("<d" if size == 8 else "<f", value)
    return int(value).to_bytes(size, "little", signed=value < 0)
