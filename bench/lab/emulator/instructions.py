"""Instructions that the model lacks or gets wrong, executed with numpy: buffer accesses, moves between lanes, halves of LDS."""

from __future__ import annotations

import ctypes
import dataclasses
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from bench.lab.emulator.memory import Memory
from bench.lab.emulator.model import EXEC, LANES, PC

LANE = np.arange(LANES)
Plain = Callable[["Wave"], None]  # an instruction as the model executes it

# Buffer accesses by operation code: bytes of each lane, whether they are stored, and what becomes of less than a register.
BUFFER = {
    16: (1, False, "u"), 17: (1, False, "i"), 18: (2, False, "u"), 19: (2, False, "i"), 20: (4, False, ""),
    21: (8, False, ""), 22: (12, False, ""), 23: (16, False, ""), 24: (1, True, "low"), 25: (2, True, "low"),
    26: (4, True, ""), 27: (8, True, ""), 28: (12, True, ""), 29: (16, True, ""), 30: (1, False, "d16"),
    32: (2, False, "d16"), 35: (2, False, "d16 high"), 36: (1, True, "high"), 37: (2, True, "high"),
}  # fmt: skip


@dataclasses.dataclass
class Wave:
    """32 lanes in step. `buffers` are the addresses that the model's compiled instructions take."""

    state: Any
    buffers: list[Any]
    vector: np.ndarray
    scalar: np.ndarray
    scratch: Any = None  # kept alive
    finished: bool = False

    @property
    def active(self) -> np.ndarray:
        return (self.scalar[EXEC] >> LANE.astype(np.uint32) & 1).astype(bool)

    @property
    def counter(self) -> int:
        return int(self.scalar[PC]) | int(self.scalar[PC + 1]) << 32

    def register(self, number: int) -> np.ndarray:
        """A vector register, (32,) uint32; writing to it writes the register."""
        return self.vector[number * LANES : (number + 1) * LANES]

    def pair(self, number: int) -> int:
        """Two scalar registers as one number."""
        return int(self.scalar[number]) | int(self.scalar[number + 1]) << 32

    def advance(self, size: int) -> None:
        after = self.counter + size
        self.scalar[PC], self.scalar[PC + 1] = after & 0xFFFFFFFF, after >> 32


def buffer_access(word: int, second: int, memory: Memory, place: str) -> Plain:
    """A buffer load or store (MUBUF): lanes beyond the number of records read 0 and write nothing."""
    code = (word >> 18) & 0xFF
    if code not in BUFFER:
        raise NotImplementedError(f"the buffer instruction {code}")
    width, is_store, part = BUFFER[code]
    offset, address, data = word & 0xFFF, second & 0xFF, (second >> 8) & 0xFF
    resource, has_offsets, scalar_offset = ((second >> 16) & 0x1F) * 4, (second >> 22) & 1, second >> 24
    assert not (second >> 23) & 1, "a buffer access with an index"

    def execute(wave: Wave) -> None:
        active = wave.active
        start = wave.pair(resource) & 0xFFFFFFFFFFFF
        offsets = (wave.register(address).astype(np.int64) if has_offsets else np.zeros(LANES, np.int64)) + offset
        inside = active & (offsets + width <= int(wave.scalar[resource + 2]))
        shift = int(wave.scalar[scalar_offset]) if scalar_offset < 192 else 0
        addresses = (start + shift + offsets)[inside]
        owners = memory.record(addresses, width, is_store, place) if len(addresses) else np.zeros(0, np.int64)
        if is_store:
            memory.store(addresses, _to_bytes(wave, data, width, part)[inside], owners)
        else:
            values = np.zeros((LANES, width), np.uint8)
            values[inside] = memory.load(addresses, width, owners)
            _from_bytes(wave, data, values, part, active)
        wave.advance(8)

    return execute


def _to_bytes(wave: Wave, data: int, width: int, part: str) -> np.ndarray:
    """(32, width) bytes of a register, of its upper half, or of several registers."""
    words = np.stack([wave.register(data + index) for index in range(max(1, width // 4))], axis=1)
    if part == "high":
        words = words >> 16
    return np.ascontiguousarray(words).view(np.uint8)[:, :width]


def _from_bytes(wave: Wave, data: int, values: np.ndarray, part: str, active: np.ndarray) -> None:
    """Writes registers of the active lanes; less than a register is extended, or takes one half of it."""
    width = values.shape[1]
    if width >= 4:
        words = np.ascontiguousarray(values).view(np.uint32)
        for index in range(width // 4):
            wave.register(data + index)[active] = words[active, index]
        return
    kind = {1: np.int8, 2: np.int16} if part == "i" else {1: np.uint8, 2: np.uint16}
    loaded = np.ascontiguousarray(values).view(kind[width])[:, 0].astype(np.int64).astype(np.uint32)
    register = wave.register(data)
    if part == "d16":
        loaded = (register & 0xFFFF0000) | (loaded & 0xFFFF)
    elif part == "d16 high":
        loaded = (register & 0xFFFF) | (loaded << 16)
    register[active] = loaded[active]


def swizzle(offset: int, result: int, source: int, size: int) -> Plain:
    """DS_SWIZZLE_B32."""
    if offset & 0x8000:
        lanes = (LANE & ~3) + ((offset >> (2 * (LANE & 3))) & 3)
    else:
        lanes = ((LANE & (offset & 31)) | ((offset >> 5) & 31)) ^ ((offset >> 10) & 31)

    def execute(wave: Wave) -> None:
        active = wave.active
        moved = np.where(active[lanes], wave.register(source)[lanes], 0)
        wave.register(result)[active] = moved[active]
        wave.advance(size)

    return execute


def dpp(
    plain: Plain,
    source: int,
    result: int | None,
    spare: int,
    lanes: np.ndarray,
    valid: np.ndarray,
    enabled: np.ndarray,
    fetch_inactive: bool,
    bound_control: bool,
) -> Plain:
    """An instruction whose source lanes are moved first, to a spare register that it was rewritten to read."""

    def execute(wave: Wave) -> None:
        saved = wave.register(spare).copy()
        before = None if result is None else wave.register(result).copy()
        readable = valid if fetch_inactive else valid & wave.active[lanes]
        wave.register(spare)[:] = np.where(readable, wave.register(source)[lanes], 0)
        plain(wave)
        kept = ~(enabled if bound_control else enabled & readable)
        if before is not None and result is not None:
            wave.register(result)[kept] = before[kept]
        wave.register(spare)[:] = saved

    return execute


def permute_lanes(address: int, size: int, across_rows: bool) -> Plain:
    """V_PERMLANE16_B32 and V_PERMLANEX16_B32: the model drops selects that are literals."""
    word, second, literal = struct.unpack("<III", ctypes.string_at(address, 12))
    result, source = word & 0xFF, (second & 0x1FF) - 256
    selects = (second >> 9) & 0x1FF, (second >> 18) & 0x1FF
    fetch_inactive, bound_control = (word >> 11) & 1, (word >> 12) & 1

    def execute(wave: Wave) -> None:
        low, high = (literal if select == 255 else int(wave.scalar[select]) for select in selects)
        chosen = np.array([((low | high << 32) >> (4 * (lane & 15))) & 15 for lane in range(LANES)])
        lanes = ((LANE & ~15) ^ (16 * across_rows)) + chosen
        active = wave.active
        readable = active[lanes] | bool(fetch_inactive)
        values = np.where(readable, wave.register(source)[lanes], 0)
        written = active & (readable | bool(bound_control))
        wave.register(result)[written] = values[written]
        wave.advance(size)

    return execute


def half_load(plain: Plain, result: int, high: bool) -> Plain:
    """A 16-bit load of LDS into half a register: the model does not keep the other half."""

    def execute(wave: Wave) -> None:
        active, before = wave.active, wave.register(result).copy()
        plain(wave)
        loaded = wave.register(result) & 0xFFFF
        merged = (before & 0xFFFF) | (loaded << 16) if high else (before & 0xFFFF0000) | loaded
        wave.register(result)[:] = np.where(active, merged, before)

    return execute


def width_of(name: str) -> int:
    """Bytes of each lane that an instruction of this name accesses."""
    found = re.findall(r"(?:DWORDX(\d)|[BUIF](8|16|32|64|96|128))(?=_|$)", name)
    if found:
        words, bits = found[-1]
        return 4 * int(words) if words else int(bits) // 8
    return 4
