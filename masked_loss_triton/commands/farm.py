"""Command-line flags for several machines, or several workers: --shard, --engine ray and what belongs to it."""

from __future__ import annotations

import argparse
import sys
import uuid
from typing import Any

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.shard import Shard, parse_shard


def add_shard_argument(parser: Any) -> None:
    """--shard."""
    parser.add_argument(
        "--shard",
        metavar="I/N",
        help="do part I of N, counted from 0, and leave the rest to other processes or machines; `env` reads both from "
        "the variables of Slurm, torchrun or SkyPilot (one of these names reads only its own)",
    )


def add_engine_arguments(parser: Any) -> None:
    """--engine, --ray_address, --num_gpus; --workers stands with the command."""
    parser.add_argument(
        "--engine",
        choices=("threads", "ray"),
        default="threads",
        help="threads of this process (default), or workers of Ray, on this machine or a cluster; needs the extra `ray`",
    )
    parser.add_argument(
        "--ray_address",
        metavar="HOST:PORT",
        help="of a cluster's head, or `auto`, whose machines all see the same folders; default: RAY_ADDRESS, else a Ray "
        "that runs on this machine while this command does",
    )
    parser.add_argument(
        "--num_gpus",
        type=float,
        metavar="X",
        help="GPUs of each worker of Ray, also a part of one (default: 1 where models run and there are any)",
    )


def shard_of(args: argparse.Namespace) -> Shard:
    """The shard of --shard; says on standard error from which variables it was read.

    Raises:
        UserError: for no such shard, with exit status 2.
    """
    shard = parse_shard(args.shard)
    if shard.read_from:
        print(
            f"masked-loss {args.command}: shard {shard}, from {', '.join(shard.read_from)}", file=sys.stderr, flush=True
        )
    return shard


def ray_options(args: argparse.Namespace) -> dict[str, Any] | None:
    """The keywords of `run_ray` that flags give and a name for the run, or None without --engine ray.

    Raises:
        UserError: for flags of Ray without it, and for a negative number of GPUs, with exit status 2.
    """
    if args.engine != "ray":
        for flag in ("ray_address", "num_gpus"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} belongs to --engine ray: add that, or leave it out", 2)
        return None
    if args.num_gpus is not None and not 0 <= args.num_gpus < float("inf"):
        raise UserError(f"--num_gpus must be 0 or more, got {args.num_gpus}", 2)
    return {
        "run": uuid.uuid4().hex,
        "workers": args.workers,
        "num_gpus": args.num_gpus,
        "address": args.ray_address,
        "debug": args.debug,
    }
