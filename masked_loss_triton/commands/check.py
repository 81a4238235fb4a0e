"""`masked-loss check`: every problem of a dataset's masks and caches in one table."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masked_loss_triton.cache.checked import Checked, Findings

HELP = "List every problem of a dataset's masks and latent caches; changes nothing."
EXAMPLE = "masked-loss check --dataset_config dataset.toml --masks masks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from masked_loss_triton.commands.arguments import add_dataset_arguments, add_workers_argument
    from masked_loss_triton.commands.farm import add_shard_argument

    add_dataset_arguments(parser, required=False)
    parser.add_argument("--json", action="store_true", help="print the problems as JSON on standard output")
    parser.add_argument(
        "--ignore",
        default="",
        metavar="KIND,KIND",
        help="kinds of problems to leave out, for example missing,size; with damaged among them no cache is read whole",
    )
    add_workers_argument(parser)
    machines = parser.add_argument_group("several machines")
    add_shard_argument(machines)
    machines.add_argument(
        "--merge",
        nargs="+",
        metavar="FILE",
        help="put together what --json --shard 0/N to N-1/N printed, and say what one process would have said; nothing is "
        "looked at again",
    )


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from masked_loss_triton.cache.checked import merge
    from masked_loss_triton.cache.kinds import KINDS
    from masked_loss_triton.errors import UserError

    ignored = {kind for kind in args.ignore.split(",") if kind}
    if ignored - set(KINDS):
        raise UserError(f"--ignore: no kind {min(ignored - set(KINDS))!r}; there are {', '.join(KINDS)}", 2)
    if args.merge is not None and (args.dataset_config is not None or args.shard is not None):
        raise UserError("--merge looks at nothing but its files: leave out --dataset_config and --shard", 2)
    if args.merge is None and args.dataset_config is None:
        raise UserError("the following arguments are required: --dataset_config, or --merge", 2)
    checked = _check(args, ignored) if args.merge is None else merge(args.merge)
    found = checked.findings(ignored)
    if args.json and args.shard is not None:
        print(json.dumps(checked.to_json(), indent=1))
    elif args.json:
        print(json.dumps([dataclasses.asdict(problem) for problem in found.problems], indent=1))
    else:
        counts = f"{checked.pictures} pictures and clips, {checked.caches} latent caches"
        print(f"{counts}, {len(found.problems)} problems" + (f" in shard {checked.shard}" if args.shard else ""))
        _print_table(found)
    return 1 if found.problems else 0


def _check(args: argparse.Namespace, ignored: set[str]) -> Checked:
    from masked_loss_triton.cache.families import FAMILIES
    from masked_loss_triton.cache.inject import prepare
    from masked_loss_triton.cache.items import choose_family
    from masked_loss_triton.cache.problems import check_shard
    from masked_loss_triton.commands.arguments import datasets_from
    from masked_loss_triton.commands.farm import shard_of
    from masked_loss_triton.files.progress import Progress

    shard = shard_of(args)
    datasets = datasets_from(args, need_source=False)
    family = FAMILIES[choose_family(datasets, args.arch)]
    prepared = [prepare(dataset, family) for dataset in datasets]
    parts = [dataset.part(shard) for dataset in prepared]
    with Progress("check", sum(len(part.sources) + len(part.items) for part in parts)) as progress:
        return check_shard(
            prepared, shard, ignore=ignored, workers=args.workers, advance=progress.advance, debug=args.debug
        )


def _print_table(found: Findings) -> None:
    from masked_loss_triton.cache.kinds import KINDS
    from masked_loss_triton.files.progress import printable

    if found.options:
        print("Masked with: " + "; ".join(f"{text} ({count})" for text, count in found.options.most_common()))
    if found.labels:
        print("Labels: " + ", ".join(f"{label} in {count} caches" for label, count in sorted(found.labels.items())))
    for kind, meaning in KINDS.items():
        of_kind = [problem for problem in found.problems if problem.kind == kind]
        if of_kind:
            print(f"\n{kind} ({len(of_kind)}): {meaning}")
            width = min(60, max(len(problem.file) for problem in of_kind))
            for problem in of_kind:
                print(printable(f"  {problem.file:<{width}}  {problem.message}"))
