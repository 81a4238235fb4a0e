"""The sizes of the torch backend's blocks on the CPU, beside each other.

python -m bench.blocks                      # milliseconds of forward and backward, the fastest of 30 rounds
"""

from __future__ import annotations

import argparse
import time
from unittest import mock

import torch

from bench.cases import LARGE, MAIN, Case, build
from masked_loss_triton import masked_loss
from masked_loss_triton.backend import blocks

CASES = (
    Case(latents=MAIN),
    Case(latents=MAIN, dtype=torch.bfloat16, prior=True),
    Case(latents=LARGE),
    Case(latents=LARGE, dtype=torch.bfloat16),
)
SIZES = tuple(factor << 15 for factor in (2, 3, 4, 6, 8, 16, 64))


def milliseconds(case: Case, rounds: int) -> list[float]:
    """Of each size. They take turns, so that a busy moment of the machine meets all of them."""
    call = build(case)
    fastest = [float("inf")] * len(SIZES)
    for _ in range(rounds):
        for index, size in enumerate(SIZES):
            with mock.patch.object(blocks, "CPU_BLOCK", size):
                start = time.perf_counter()
                loss = masked_loss(call.pred, call.target, call.mask, call.config, backend="torch", **call.keywords)
                torch.autograd.grad(loss, call.pred)
                fastest[index] = min(fastest[index], 1e3 * (time.perf_counter() - start))
    return fastest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.blocks", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args(arguments).rounds
    print(f"{'elements per thread':<32}" + "".join(f"{size >> 15:>6} << 15" for size in SIZES))
    for case in CASES:
        print(f"{case.name:<32}" + "".join(f"{value:>12.2f}" for value in milliseconds(case, rounds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
