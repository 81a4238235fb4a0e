"""Does the emulator execute what Triton emits? Small kernels over many instructions, beside torch.

TINYGRAD=/a/tinygrad/checkout python -m bench.lab.emulator.selfcheck       # exit status 1 when one disagrees
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.language.extra import libdevice

from bench.lab.emulator.machine import run
from bench.lab.emulator.memory import OutOfBounds
from bench.lab.launches import Launch

TARGET = GPUTarget("hip", "gfx1100", 32)
Check = tuple[str, Any, tuple[int, ...], dict[str, Any], Callable[[], torch.Tensor]]


@triton.jit
def elementwise(x_ptr, y_ptr, n, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n, other=1.0).to(tl.float32)
    if OPERATION == "exp":
        y = tl.exp(x)
    elif OPERATION == "log":
        y = tl.log(tl.abs(x) + 0.1)
    elif OPERATION == "sqrt":
        y = tl.sqrt_rn(tl.abs(x))
    elif OPERATION == "rsqrt":
        y = tl.rsqrt(tl.abs(x) + 0.1)
    elif OPERATION == "division":
        y = 1.5 / (x + 10.0)
    elif OPERATION == "rounded division":
        y = tl.div_rn(1.5, x + 10.0)
    elif OPERATION == "sine":
        y = tl.sin(x)
    elif OPERATION == "tanh":
        y = libdevice.tanh(x)
    elif OPERATION == "power":
        y = libdevice.pow(tl.abs(x), 0.7)
    elif OPERATION == "floor and ceil":
        y = tl.floor(x * 3) + tl.ceil(x)
    elif OPERATION == "where":
        y = tl.where(x > 0, x, -2 * x)
    elif OPERATION == "remainder":
        y = ((x * 100).to(tl.int32) % 7).to(tl.float32)
    elif OPERATION == "64-bit product":
        y = (((x * 1e6).to(tl.int64) * 123456789) >> 20).to(tl.float32)
    else:
        tl.static_assert(OPERATION == "float64")
        y = (x.to(tl.float64) / 3.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=offsets < n)


@triton.jit
def softmax(x_ptr, y_ptr, columns, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    offsets = tl.program_id(0) * columns + column
    x = tl.load(x_ptr + offsets, mask=column < columns, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + offsets, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), mask=column < columns)


@triton.jit
def reduced(x_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, OPERATION: tl.constexpr):
    row, column = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + row * N + column)
    if OPERATION == "cumulative sum":
        tl.store(y_ptr + row * N + column, tl.cumsum(x, AXIS))
    elif OPERATION == "transposed":
        tl.store(y_ptr + tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :], tl.trans(x))
    elif OPERATION == "sorted":
        tl.store(y_ptr + row * N + column, tl.sort(x, 1))
    else:
        y = tl.sum(x, AXIS) if OPERATION == "sum" else tl.max(x, AXIS)
        tl.store(y_ptr + (tl.arange(0, M) if AXIS == 1 else tl.arange(0, N)), y)


@triton.jit
def strided_sum(x_ptr, y_ptr, n, blocks, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(x_ptr + offsets, mask=offsets < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def added_atomically(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr, tl.sum(tl.load(x_ptr + offsets, mask=offsets < n, other=0.0), 0))


@triton.jit
def product(a_ptr, b_ptr, y_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_ptr + row * K + inner[None, :])
    tl.store(y_ptr + row * N + column, tl.dot(a, tl.load(b_ptr + inner[:, None] * N + column)))


@triton.jit
def grid_of_three(y_ptr, X, Y):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tl.store(y_ptr + (z * Y + y) * X + x, (x + 10 * y + 100 * z + 1000 * tl.num_programs(1)).to(tl.float32))


@triton.jit
def gathered(x_ptr, index_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + offsets, mask=offsets < n, other=0)
    tl.store(y_ptr + offsets, tl.load(x_ptr + index, mask=offsets < n), mask=offsets < n)


def checks() -> list[Check]:
    """(name, kernel, grid, arguments, what y must be) of each."""
    x = torch.randn(700)
    truths: dict[str, Callable[[], torch.Tensor]] = {
        "exp": lambda: x.exp(),
        "log": lambda: (x.abs() + 0.1).log(),
        "sqrt": lambda: x.abs().sqrt(),
        "rsqrt": lambda: (x.abs() + 0.1).rsqrt(),
        "division": lambda: 1.5 / (x + 10),
        "rounded division": lambda: 1.5 / (x + 10),
        "sine": lambda: x.sin(),
        "tanh": lambda: x.tanh(),
        "power": lambda: x.abs().pow(0.7),
        "floor and ceil": lambda: (x * 3).floor() + x.ceil(),
        "where": lambda: torch.where(x > 0, x, -2 * x),
        "remainder": lambda: torch.fmod((x * 100).int(), 7).float(),
        "64-bit product": lambda: ((x * 1e6).long() * 123456789 >> 20).float(),
        "float64": lambda: (x.double() / 3).float(),
    }
    found: list[Check] = []

    def check(
        name: str, kernel: Any, grid: tuple[int, ...], truth: Callable[[], torch.Tensor], **arguments: Any
    ) -> None:
        found.append((name, kernel, grid, arguments, truth))

    for name, truth in truths.items():
        check(name, elementwise, (3,), truth, x_ptr=x, y_ptr=torch.empty(700), n=700, OPERATION=name, BLOCK=256)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.randn(3, 200).to(dtype)
        y = torch.zeros_like(rows)
        check(
            f"softmax {dtype}",
            softmax,
            (3,),
            lambda r=rows: r.float().softmax(1),
            x_ptr=rows,
            y_ptr=y,
            columns=200,
            BLOCK=256,
        )
        a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 32).to(dtype)
        y, sizes = torch.zeros(32, 32), dict(M=32, N=32, K=64)
        check(
            f"product {dtype}",
            product,
            (1,),
            lambda a=a, b=b: a.float() @ b.float(),
            a_ptr=a,
            b_ptr=b,
            y_ptr=y,
            **sizes,
        )
    matrix = torch.randn(32, 64)
    for axis in (0, 1):
        sums = {"sum": matrix.sum(axis), "max": matrix.amax(axis), "cumulative sum": matrix.cumsum(axis)}
        for name, truth in sums.items():
            given = dict(x_ptr=matrix, y_ptr=torch.zeros_like(truth), M=32, N=64, AXIS=axis, OPERATION=name)
            check(f"{name}, axis {axis}", reduced, (1,), lambda truth=truth: truth, **given)
    for name, truth in {"transposed": matrix.T.contiguous(), "sorted": matrix.sort(1)[0]}.items():
        given = dict(x_ptr=matrix, y_ptr=torch.zeros_like(truth), M=32, N=64, AXIS=1, OPERATION=name)
        check(name, reduced, (1,), lambda truth=truth: truth, **given)
    many = torch.randn(5000).bfloat16()
    parts = torch.zeros(3)
    truth = torch.stack([many.float().view(-1)[i * 256 : (i + 1) * 256].sum() for i in range(20)])
    check("strided sum", strided_sum, (3,), lambda: torch.stack([truth[i::3].sum() for i in range(3)]),
          x_ptr=many, y_ptr=parts, n=5000, blocks=20, BLOCK=256)  # fmt: skip
    check("atomic", added_atomically, (3,), lambda: x.sum().view(1), x_ptr=x, y_ptr=torch.zeros(1), n=700, BLOCK=256)
    cells = [x + 10 * y + 100 * z + 3000.0 for z in range(2) for y in range(3) for x in range(4)]
    check("three axes", grid_of_three, (4, 3, 2), lambda: torch.tensor(cells), y_ptr=torch.zeros(24), X=4, Y=3)
    index = torch.randint(0, 700, (500,))
    check(
        "gather", gathered, (2,), lambda: x[index], x_ptr=x, index_ptr=index, y_ptr=torch.zeros(500), n=500, BLOCK=256
    )
    return found


def execute(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], num_warps: int) -> None:
    launch = Launch(kernel, grid, arguments, dict(num_warps=num_warps))
    run(launch.compile(TARGET), grid, launch.passed(TARGET))


def main() -> int:
    torch.manual_seed(0)
    failed = 0
    for name, kernel, grid, arguments, truth in checks():
        for num_warps in (4, 1) if kernel in (softmax, reduced) else (4,):
            y = arguments["y_ptr"].zero_()
            execute(kernel, grid, arguments, num_warps)
            want = truth().float()
            error = ((y.float() - want).abs() / (want.abs() + 1e-2)).max().item()
            good = error <= (2e-2 if y.dtype != torch.float32 else 2e-3)
            failed += not good
            print(f"{'ok' if good else 'FAILED':<7}{name}, {num_warps} warps: error {error:.1e}")
    outside = dict(x_ptr=torch.zeros(700), index_ptr=torch.full((500,), 700), y_ptr=torch.zeros(500), n=500, BLOCK=256)
    try:
        execute(gathered, (2,), outside, 4)
        failed += 1
        print("FAILED an access out of bounds was not seen")
    except OutOfBounds as error:
        print(f"ok     out of bounds: {error}")
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
