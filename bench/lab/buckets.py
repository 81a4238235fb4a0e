"""How many kernels a data set with many buckets makes Triton compile: each costs the first epoch some tenths of a second.

    python -m bench.lab.buckets

The buckets are those of musubi-tuner for one resolution: widths in steps of 16 pixels from half of the square's side to all of it,
with the height that keeps the area, and the same upright (dataset/bucket.py there, at 30c658c). Nothing is compiled.
"""

from __future__ import annotations

import argparse
import collections
import math

import torch

from bench.cases import Call
from bench.lab.launches import DEVICES, launches_of
from masked_loss_triton import MaskedLossConfig

STEP, PIXELS = 16, 8  # of the sides of a bucket; of a side of a latent
DATA_SETS = {
    "WAN 512x512, 1 to 81 frames": ((512, 512), (1, 9, 13, 21)),
    "WAN 832x480, 1 to 81 frames": ((832, 480), (1, 9, 13, 21)),
    "Qwen-Image 1024x1024": ((1024, 1024), (1,)),
}


def buckets(resolution: tuple[int, int]) -> list[tuple[int, int]]:
    """Sides in pixels."""
    area = math.prod(resolution)
    side = math.isqrt(area)
    pairs = [(a, area // a // STEP * STEP) for a in range(side // 2 // STEP * STEP, side + STEP, STEP)]
    return sorted({*pairs, *((b, a) for a, b in pairs)})


def kernels(resolution: tuple[int, int], frames: tuple[int, ...], dtype: torch.dtype, target: str) -> dict[str, int]:
    """How many kernels of each name the losses of all buckets need, forward and backward, masks on the grid of the latents."""
    device = DEVICES[target]
    found: dict[str, set[str]] = collections.defaultdict(set)
    for sides in buckets(resolution):
        for count in frames:
            shape = (1, 16, count, *(side // PIXELS for side in sides))
            pred = torch.empty(shape, dtype=dtype, requires_grad=True)
            mask = torch.ones(1, *shape[2:])
            call = Call(pred, torch.empty(shape, dtype=dtype), mask, None, MaskedLossConfig(), "channels_first")
            for launch in launches_of(call, device.hardware):
                found[launch.name].add(launch.specialization(device.target))
    return {name: len(kinds) for name, kinds in found.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lab.buckets", description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=DEVICES, default="sm_90", help="default: sm_90")
    target = parser.parse_args(arguments).target
    for name, (resolution, frames) in DATA_SETS.items():
        for dtype in (torch.float32, torch.bfloat16):
            found = kernels(resolution, frames, dtype, target)
            each = ", ".join(f"{count} {kernel}" for kernel, count in found.items())
            shapes = len(buckets(resolution)) * len(frames)
            print(f"{name}, {str(dtype)[6:]}: {shapes} shapes, {sum(found.values())} kernels ({each})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
