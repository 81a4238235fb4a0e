"""What one compiled kernel costs, read from its machine code: registers, spills, shared memory, occupancy, width of each access.

NVIDIA: cuobjdump and nvdisasm, which the Triton wheel brings. AMD: the assembly that LLVM wrote. Nothing is run.
"""

from __future__ import annotations

import ast
import collections
import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import triton

from bench.lab.launches import Device
from masked_loss_triton.kernels import loss as loss_kernels

NVIDIA_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
Place = tuple[str, int]  # file, line


@dataclasses.dataclass
class MachineCode:
    """One kernel on one device.

    Args:
        spills: instructions that write registers to memory or read them back.
        local_bytes: per thread, of stack and local memory.
        widths: by tensor, in how many bits each instruction loads or stores it; the tensor is the `*_ptr` of its source line.
        occupancy: resident warps of what the multiprocessor can hold, from registers, threads and shared memory.
    """

    registers: int
    spills: int
    local_bytes: int
    shared_bytes: int
    warps: int
    occupancy: float
    instructions: int
    loads: dict[str, collections.Counter[int]]
    stores: dict[str, collections.Counter[int]]


def analyse(kernel: Any, device: Device) -> MachineCode:
    if kernel.metadata.target.backend == "cuda":
        return _nvidia(kernel, device)
    return _amd(kernel, device)


def disassembled(kernel: Any) -> str:
    """The machine code of a kernel that was compiled for an NVIDIA device, as text."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        return tool("nvdisasm", "-c", str(cubin))


def _nvidia(kernel: Any, device: Device) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        cubin = pathlib.Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = tool("cuobjdump", "--dump-resource-usage", str(cubin)).split(f"Function {kernel.metadata.name}:")[-1]
    listing = disassembled(kernel)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing, re.MULTILINE)
    shared = max(used["SHARED"], kernel.metadata.shared)
    warps = kernel.metadata.num_warps
    operations = list(_ptx_operations(kernel.asm["ptx"]))
    return MachineCode(
        registers=used["REG"],
        spills=sum(name.startswith(("STL", "LDL")) for name in names),
        local_bytes=max(used["STACK"], used["LOCAL"]),
        shared_bytes=shared,
        warps=warps,
        occupancy=_nvidia_occupancy(used["REG"], shared, warps, device),
        instructions=sum(name != "NOP" for name in names),
        loads=_widths(operations, r"ld(\.\w+)*\.global", _ptx_bits),
        stores=_widths(operations, r"st(\.\w+)*\.global", _ptx_bits),
    )


def _ptx_operations(ptx: str) -> Iterator[tuple[str, Place]]:
    """Instructions with their places, from the PTX: ptxas neither merges accesses nor splits them.

    Inside inline assembly, where Triton's loads are, LLVM counts the line up with every line of the assembly: only the first
    `.loc` tells the truth there, and the cubin inherits the others.
    """
    files = {index: name for index, name in re.findall(r'\.file\s+(\d+)\s+"([^"]+)"', ptx)}
    place: Place = ("", 0)
    for line, is_counted_up in _ptx_lines(ptx):
        if found := re.match(r"\s*\.loc\s+(\d+) (\d+)", line):
            if not is_counted_up:
                place = (files.get(found[1], found[1]), int(found[2]))
        elif found := re.match(r"\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)", line):
            yield found[1], place


def _ptx_lines(ptx: str) -> Iterator[tuple[str, bool]]:
    """(line, whether it is a `.loc` that LLVM counted up inside inline assembly)."""
    locations = None
    for line in ptx.splitlines():
        if "// begin inline asm" in line:
            locations = 0
        elif "// end inline asm" in line:
            locations = None
        is_location = locations is not None and line.lstrip().startswith(".loc")
        yield line, is_location and bool(locations)
        if is_location:
            locations = (locations or 0) + 1


def with_true_lines(ptx: str) -> str:
    """The PTX without the locations that LLVM counted up: what is assembled from it names the right lines."""
    return "\n".join(line for line, is_counted_up in _ptx_lines(ptx) if not is_counted_up) + "\n"


def _ptx_bits(name: str) -> int:
    vector = re.search(r"\.v(\d)", name)
    element = re.search(r"\.[busf](\d+)$", name)
    return (int(vector[1]) if vector else 1) * (int(element[1]) if element else 32)


def _nvidia_occupancy(registers: int, shared: int, warps: int, device: Device) -> float:
    """Resident warps over the most possible. Registers go to warps in units of 256; 1 KB of shared memory is the system's."""
    of_a_warp = -(-registers * 32 // 256) * 256
    # A multiprocessor has four register files of 16,384, and a warp lives in one of them.
    by_registers = (16384 // of_a_warp) * 4 // warps if of_a_warp else device.blocks
    by_memory = device.shared_memory // (shared + 1024)
    blocks = min(device.blocks, device.warps // warps, by_registers, by_memory)
    return blocks * warps / device.warps


def _amd(kernel: Any, device: Device) -> MachineCode:
    text = kernel.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    files = {
        index: os.path.join(folder, name) if folder else name
        for index, folder, name in re.findall(r'\.file\s+(\d+)\s+(?:"([^"]*)"\s+)?"([^"]*)"', text)
    }
    body = text.split(f"\n{kernel.metadata.name}:", 1)[1].split(".Lfunc_end0", 1)[0]
    place: Place = ("", 0)
    operations = []
    for line in body.splitlines():
        if found := re.match(r"\s+\.loc\s+(\d+) (\d+)", line):
            place = (files.get(found[1], found[1]), int(found[2]))
        elif found := re.match(r"\t([a-z]\w+)", line):
            operations.append((found[1], place))
    occupancy = re.search(r"Occupancy:?\s+(\d+)", text)
    return MachineCode(
        registers=number("vgpr_count"),
        spills=number("vgpr_spill_count") + number("sgpr_spill_count"),
        local_bytes=number("private_segment_fixed_size"),
        shared_bytes=max(kernel.metadata.shared, number("group_segment_fixed_size")),
        warps=kernel.metadata.num_warps,
        occupancy=(int(occupancy[1]) if occupancy else 0) / device.warps,
        instructions=len(operations),
        loads=_widths(operations, r"(global|buffer|flat)_load", _amd_bits),
        stores=_widths(operations, r"(global|buffer|flat)_store", _amd_bits),
    )


def _amd_bits(name: str) -> int:
    if found := re.search(r"_(?:dwordx(\d)|[ui]?b(\d+))$", name):
        return 32 * int(found[1]) if found[1] else int(found[2])
    if re.search(r"_(u|s)?byte(_d16)?", name):
        return 8
    return 16 if re.search(r"_(u|s)?short", name) else 32


def _widths(operations: list[tuple[str, Place]], pattern: str, bits: Any) -> dict[str, collections.Counter[int]]:
    result: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for name, (file, line) in operations:
        if re.match(pattern, name):
            result[tensor_at(file, line)][bits(name)] += 1
    return dict(result)


def tensor_at(file: str, line: int) -> str:
    """The tensor that `tl.load` or `tl.store` on this line works on: `pred_ptr + ...` is "pred"."""
    return _accesses(file).get(line, f"{pathlib.Path(file).name}:{line}")


@functools.cache
def _accesses(file: str) -> dict[int, str]:
    if not os.path.exists(file):
        return {}
    names: dict[int, str] = {}
    calls = [
        node for node in ast.walk(ast.parse(pathlib.Path(file).read_text())) if isinstance(node, ast.Call) and node.args
    ]
    # Loads and stores first. Then helpers that take a pointer: some tools name the line of the call, and not the load inside.
    accesses = [node for node in calls if ast.unparse(node.func) in ("tl.load", "tl.store", "tl.atomic_add")]
    for node in [*accesses, *calls]:
        if pointer := re.search(r"(\w+)(?:_ptr|\.ptr)\b", ast.unparse(node.args[0])):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                names.setdefault(line, pointer[1])
    return names


# Now, as Triton has read the kernels now: who edits them while this runs gets true names all the same.
for _file in pathlib.Path(loss_kernels.__file__).parent.glob("*.py"):
    _accesses(str(_file))


def tool(name: str, *arguments: str) -> str:
    """Standard output of a tool of the CUDA toolkit in the Triton wheel."""
    finished = subprocess.run([str(NVIDIA_TOOLS / name), *arguments], capture_output=True, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"{name} failed with status {finished.returncode}: {finished.stderr.strip()}")
    return finished.stdout
