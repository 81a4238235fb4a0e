"""A compiled kernel in memory, ready to be executed: its image, its entry, and what of it the model cannot execute as it is."""

from __future__ import annotations

import ctypes
import re
import struct
from typing import Any

import numpy as np

from bench.lab.emulator.model import ARCHITECTURE, LANES, KernelDescriptor, decode_inst, elf_loader, emu

S_NOP = 0xBF800000
# buffer_gl0_inv and buffer_gl1_inv empty caches: nothing to do here, and the model cannot decode them.
CACHE_INVALIDATES = (0xE0AC0000, 0xE0B00000)
IDENTITY = 0xE4 << 8 | 1 << 19 | 0xFF000000  # a DPP control word that moves no lane


class CodeObject:
    """The image of a kernel at a fixed address, with instructions rewritten that the model gets wrong.

    Args:
        special: by offset in the image, what instructions.py executes instead of the model.
        lines: by offset, the file and line that an instruction comes from.
    """

    def __init__(self, kernel: Any) -> None:
        image, sections, relocations = elf_loader(kernel.asm["hsaco"])
        self.image = bytearray(image)
        for offset, target, kind, addend in relocations:
            assert kind == 5, f"a relocation of kind {kind}"  # R_AMDGPU_REL64
            struct.pack_into("<q", self.image, offset, target - offset + addend)
        read_only = next(s.header.sh_addr for s in sections if s.name == ".rodata")
        size = ctypes.sizeof(KernelDescriptor)
        self.descriptor = KernelDescriptor.from_buffer_copy(bytes(self.image[read_only : read_only + size]))
        assert self.descriptor.kernel_code_properties & 0x7F == 8, "scalar registers that hold more than the arguments"
        self.entry = read_only + self.descriptor.kernel_code_entry_byte_offset
        text = kernel.asm["amdgcn"]
        length = re.search(r"codeLenInByte = (\d+)", text)
        assert length is not None, "the assembly does not say how long the code is"
        self.special: dict[int, tuple[Any, ...]] = {}
        offsets = self._sweep(self.entry + int(length[1]))
        lines = _source_lines(text, kernel.metadata.name)
        self.lines = dict(zip(offsets, lines, strict=True)) if len(lines) == len(offsets) else {}
        self._memory = ctypes.create_string_buffer(len(self.image) + 4096 + 64)
        self.base = (ctypes.addressof(self._memory) + 4095) & ~4095
        ctypes.memmove(self.base, bytes(self.image), len(self.image))
        self.arguments = text[text.index("amdhsa.kernels") :]

    def _sweep(self, end: int) -> list[int]:
        """Rewrites instructions from the entry to `end`; their offsets."""
        offsets, at = [], self.entry
        while at < end:
            offsets.append(at)
            word, second = struct.unpack_from("<II", self.image, at)
            if word in CACHE_INVALIDATES:
                struct.pack_into("<II", self.image, at, S_NOP, S_NOP)
                at += 8
            elif word >> 26 == 0b111000:
                self.special[at] = ("buffer", word, second)
                at += 8
            else:
                at += self._rewritten(at, word, second)
        return offsets

    def _rewritten(self, at: int, word: int, second: int) -> int:
        """The size of an instruction that the model can decode, noted where it cannot execute it."""
        instruction = decode_inst(bytes(self.image[at : at + 16]), ARCHITECTURE)
        kind = type(instruction).__name__
        if emu._op_name(instruction) == "DS_SWIZZLE_B32":
            offset = int(instruction.offset0) | (int(instruction.offset1) << 8)
            registers = instruction.vdst.offset & 255, instruction.addr.offset & 255
            self.special[at] = ("swizzle", offset, *registers, instruction.size())
        elif "DPP16" in kind:
            if kind not in ("VOP1_DPP16", "VOP2_DPP16", "VOPC_DPP16"):
                raise NotImplementedError(kind)
            self._rewrite_dpp(at, word, second, has_result=not kind.startswith("VOPC"))
        return instruction.size()

    def _rewrite_dpp(self, at: int, word: int, second: int, has_result: bool) -> None:
        """The model reads the source lane from registers that it is writing, lacks row_xmask and row_share, and writes lanes that
        row and bank masks switch off. Here the lanes are moved to a spare register first, which the instruction then reads."""
        source = second & 0xFF
        result = (word >> 17) & 0xFF if has_result else None
        spare = next(r for r in (255, 254, 253, 252) if r not in (source, result, (word >> 9) & 0xFF))
        lanes, valid = dpp_lanes((second >> 8) & 0x1FF)
        bank, row, lane = (second >> 24) & 15, (second >> 28) & 15, np.arange(LANES)
        enabled = (((row >> (lane // 16)) & 1) & ((bank >> ((lane & 15) // 4)) & 1)).astype(bool)
        fetch_inactive, bound_control = bool((second >> 18) & 1), bool((second >> 19) & 1)
        struct.pack_into("<I", self.image, at + 4, (second & 0x00F00000) | IDENTITY | spare)
        self.special[at] = ("dpp", source, result, spare, lanes, valid, enabled, fetch_inactive, bound_control)


def dpp_lanes(control: int) -> tuple[np.ndarray, np.ndarray]:
    """The lane that each lane reads from under a DPP control word, and whether there is one."""
    lane = np.arange(LANES)
    row, place = lane & ~15, lane & 15
    source, valid, amount = lane.copy(), np.ones(LANES, bool), control & 15
    if control < 0x100:  # quad_perm
        source = (lane & ~3) + ((control >> (2 * (lane & 3))) & 3)
    elif 0x101 <= control <= 0x10F:  # row_shl
        source, valid = row + place + amount, place + amount <= 15
    elif 0x111 <= control <= 0x11F:  # row_shr
        source, valid = row + place - amount, place >= amount
    elif 0x121 <= control <= 0x12F:  # row_ror
        source = row + ((place - amount) & 15)
    elif control == 0x140:  # row_mirror
        source = row + 15 - place
    elif control == 0x141:  # row_half_mirror
        source = (lane & ~7) + 7 - (lane & 7)
    elif 0x150 <= control <= 0x15F:  # row_share
        source = row + amount
    elif 0x160 <= control <= 0x16F:  # row_xmask
        source = row + (place ^ amount)
    else:
        raise NotImplementedError(f"the DPP control word {control:#x}")
    return np.where(valid, source, 0), valid


def _source_lines(text: str, name: str) -> list[str | None]:
    """The place in the source of each instruction of the listing."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"', text))
    line: str | None = None
    lines = []
    for written in text.split(f"\n{name}:", 1)[1].split(".Lfunc_end0", 1)[0].splitlines():
        if found := re.match(r"\s+\.loc\s+(\d+) (\d+)", written):
            line = f"{files.get(found[1], found[1])}:{found[2]}"
        elif re.match(r"\t[a-z]", written):
            lines.append(line)
    return lines
