"""`masked-loss check`: every problem of a dataset's masks and caches in one table."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masked_loss_triton.cache.problems import Findings

HELP = "List every problem of a dataset's masks and latent caches; changes nothing."
EXAMPLE = "masked-loss check --dataset_config dataset.toml --mask_directory masks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from masked_loss_triton.commands.arguments import add_dataset_arguments, add_workers_argument

    add_dataset_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the problems as JSON on standard output")
    parser.add_argument(
        "--ignore",
        default="",
        metavar="KIND,KIND",
        help="kinds of problems to leave out, for example missing,size; with damaged among them no cache is read whole",
    )
    add_workers_argument(parser)


def run(args: argparse.Namespace) -> int:
    import dataclasses
    import json

    from masked_loss_triton.cache.families import FAMILIES
    from masked_loss_triton.cache.inject import prepare
    from masked_loss_triton.cache.items import choose_family
    from masked_loss_triton.cache.kinds import KINDS
    from masked_loss_triton.cache.problems import find_problems
    from masked_loss_triton.commands.arguments import datasets_from
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.progress import Progress

    ignored = {kind for kind in args.ignore.split(",") if kind}
    if ignored - set(KINDS):
        raise UserError(f"--ignore: no kind {min(ignored - set(KINDS))!r}; there are {', '.join(KINDS)}", 2)
    datasets = datasets_from(args, need_source=False)
    family = FAMILIES[choose_family(datasets, args.arch)]
    prepared = [prepare(dataset, family) for dataset in datasets]
    pictures = sum(len(dataset.sources) for dataset in prepared)
    caches = sum(len(dataset.items) for dataset in prepared)
    with Progress("check", pictures + caches) as progress:
        found = find_problems(
            prepared, ignore=ignored, workers=args.workers, advance=progress.advance, debug=args.debug
        )
    if args.json:
        print(json.dumps([dataclasses.asdict(problem) for problem in found.problems], indent=1))
    else:
        print(f"{pictures} pictures and clips, {caches} latent caches, {len(found.problems)} problems")
        _print_table(found)
    return 1 if found.problems else 0


def _print_table(found: Findings) -> None:
    from masked_loss_triton.cache.kinds import KINDS
    from masked_loss_triton.files.progress import printable

    if found.options:
        print("Masked with: " + "; ".join(f"{text} ({count})" for text, count in found.options.most_common()))
    for kind, meaning in KINDS.items():
        of_kind = [problem for problem in found.problems if problem.kind == kind]
        if of_kind:
            print(f"\n{kind} ({len(of_kind)}): {meaning}")
            width = min(60, max(len(problem.file) for problem in of_kind))
            for problem in of_kind:
                print(printable(f"  {problem.file:<{width}}  {problem.message}"))
