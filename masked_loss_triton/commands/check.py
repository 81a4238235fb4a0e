"""`masked-loss check`: every problem of a dataset's masks and caches in one table."""

from __future__ import annotations

import argparse

HELP = "List every problem of a dataset's masks and latent caches; changes nothing."
EXAMPLE = "masked-loss check --dataset_config dataset.toml --arch wan --mask_directory masks"


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
    from masked_loss_triton.cache.inject import Prepared, prepare
    from masked_loss_triton.cache.items import CacheItem, Source, choose_family
    from masked_loss_triton.cache.problems import (
        KINDS,
        Problem,
        check_cache,
        check_lists,
        check_mixed,
        check_source,
    )
    from masked_loss_triton.commands.arguments import datasets_from
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.parallel import default_workers, run_parallel
    from masked_loss_triton.files.progress import Progress, printable

    ignored = {kind for kind in args.ignore.split(",") if kind}
    if ignored - set(KINDS):
        raise UserError(f"--ignore: no kind {min(ignored - set(KINDS))!r}; there are {', '.join(KINDS)}", 2)
    datasets = datasets_from(args, need_source=False)
    family = FAMILIES[choose_family(datasets, args.arch)]
    prepared = [prepare(dataset, family) for dataset in datasets]
    problems: list[Problem] = []
    pictures = sum(len(one.sources) for one in prepared)
    caches = sum(len(one.items) for one in prepared)
    masked: dict[int, list[bool]] = {one.dataset.index: [] for one in prepared}

    def work(job: tuple[Prepared, Source | CacheItem]) -> tuple[int, list[Problem], bool | None]:
        one, thing = job
        if isinstance(thing, Source):
            return one.dataset.index, check_source(one, thing), None
        return one.dataset.index, *check_cache(one, thing, "damaged" not in ignored)

    things: dict[int, list[Source | CacheItem]] = {
        one.dataset.index: [*one.sources.values(), *one.items] for one in prepared
    }
    jobs = ((one, thing) for one in prepared for thing in things[one.dataset.index])
    with Progress("check", pictures + caches) as progress:
        for index, found, has_weights in run_parallel(work, jobs, args.workers or default_workers()):
            problems += found
            if has_weights is not None:
                masked[index].append(has_weights)
            progress.advance()
    for one in prepared:
        problems += check_lists(one) + check_mixed(one, masked[one.dataset.index])

    order = list(KINDS)
    # A mask that several layers or windows share is one problem.
    unique = {(problem.kind, problem.file): problem for problem in problems if problem.kind not in ignored}
    problems = sorted(unique.values(), key=lambda problem: (order.index(problem.kind), problem.file))
    if args.json:
        print(json.dumps([dataclasses.asdict(problem) for problem in problems], indent=1))
        return 1 if problems else 0
    print(f"{pictures} pictures and clips, {caches} latent caches, {len(problems)} problems")
    for kind in order:
        of_kind = [problem for problem in problems if problem.kind == kind]
        if of_kind:
            print(f"\n{kind} ({len(of_kind)}): {KINDS[kind]}")
            width = min(60, max(len(problem.file) for problem in of_kind))
            for problem in of_kind:
                print(printable(f"  {problem.file:<{width}}  {problem.message}"))
    return 1 if problems else 0
