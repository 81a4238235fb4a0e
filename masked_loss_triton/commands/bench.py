"""`masked-loss bench`: the loss on the machine at hand, beside eager torch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

HELP = "Measure the loss on this machine beside eager torch: one table, and one file to send."
EXAMPLE = "masked-loss bench --shape 1x16x21x60x104 --dtype bfloat16 --output bench.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape",
        action="append",
        metavar="BxCxFxHxW",
        help="of the prediction, BxCxFxHxW or BxCxHxW; may be repeated (1x16x21x60x104: WAN 832x480, 81 frames)",
    )
    parser.add_argument(
        "--dtype", action="append", choices=("float32", "bfloat16", "float16"), help="may be repeated (float32)"
    )
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (the GPU if there is one)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="rounds of which the median counts (20)")
    parser.add_argument("--output", default="masked-loss-bench.json", metavar="FILE", help="(masked-loss-bench.json)")


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import json
    from pathlib import Path

    import torch

    from masked_loss_triton import benchmark
    from masked_loss_triton.errors import UserError

    shapes = [_shape(text) for text in args.shape or ["1x16x21x60x104"]]
    if args.rounds < 1:
        raise UserError(f"--rounds must be 1 or more, got {args.rounds}", 2)
    if not Path(args.output).parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {Path(args.output).parent}; make it", 2)
    device = _device(args.device)
    about = benchmark.about(device)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = []
    for shape in shapes:
        for dtype in args.dtype or ["float32"]:
            try:
                rows += benchmark.measure(shape, dtype, device, args.rounds)
            except torch.OutOfMemoryError as error:
                raise UserError(f"--shape {'x'.join(map(str, shape))} does not fit into {device}: {error}") from error
    print(benchmark.table(rows))
    print("forward and backward, medians; x eager: times as fast as eager torch; N: bytes of the prediction")
    report = {**about, "rounds": args.rounds, "rows": [dataclasses.asdict(row) for row in rows]}
    Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {args.output}")
    return 0


def _shape(text: str) -> tuple[int, ...]:
    from masked_loss_triton.errors import UserError

    sizes = text.split("x")
    if len(sizes) not in (4, 5) or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f"--shape must be BxCxFxHxW or BxCxHxW, such as 1x16x21x60x104, got {text!r}", 2)
    return tuple(map(int, sizes))


def _device(name: str | None) -> torch.device:
    import torch

    from masked_loss_triton.errors import UserError

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used: {str(error).splitlines()[0]}", 2) from error
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device must be cuda or cpu, got {name}", 2)
    return device
