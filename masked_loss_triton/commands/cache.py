"""`masked-loss cache`: mask weights into the latent caches of HunyuanVideo, WAN and Qwen-Image. No VAE runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from masked_loss_triton.cache.dataset import Dataset

HELP = "Add mask weights to existing latent caches, without encoding anything again."
EXAMPLE = "masked-loss cache --dataset_config dataset.toml --arch wan --alpha_mask --mask_directory masks"
MISSING_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from masked_loss_triton.commands.arguments import add_dataset_arguments, add_workers_argument

    add_dataset_arguments(parser)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the weights")
    add_workers_argument(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and change nothing")
    parser.add_argument("--force", action="store_true", help="write weights that are up to date as well")
    parser.add_argument(
        "--encode",
        nargs=argparse.REMAINDER,
        metavar="ARG",
        help="run the trainer's own caching script first, in this process, and mask each cache as it is written; "
        "everything after this flag goes to the script",
    )
    parser.add_argument("--remove", action="store_true", help="take weights and their metadata out of the caches")


def run(args: argparse.Namespace) -> int:
    import os

    from masked_loss_triton.commands.arguments import datasets_from
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.atomic import remove_leftovers
    from masked_loss_triton.files.locks import folder_lock

    if args.encode is not None and (args.remove or args.dry_run):
        raise UserError("--encode writes caches: leave out --remove and --dry-run", 2)
    datasets = datasets_from(args, need_source=not args.remove)
    if args.dry_run:
        return _cache(args, datasets)
    folders = [dataset.cache_directory for dataset in datasets]
    for folder in folders if args.encode is not None else ():
        os.makedirs(folder, exist_ok=True)  # as the script does: there is nothing to lock before
    with folder_lock(folders, "masked-loss cache"):
        for folder in folders:
            remove_leftovers(folder)
        return _cache(args, datasets)


def _cache(args: argparse.Namespace, datasets: list[Dataset]) -> int:
    from collections import Counter

    from masked_loss_triton.cache.encode import run_caching_script
    from masked_loss_triton.cache.families import FAMILIES
    from masked_loss_triton.cache.inject import (
        Outcome,
        inject,
        prepare,
        remove_weights,
        unread_of,
    )
    from masked_loss_triton.cache.items import choose_family, no_caches
    from masked_loss_triton.files.parallel import default_workers, run_parallel
    from masked_loss_triton.files.progress import Progress, printable

    args.arch = choose_family(datasets, args.arch)
    prepared = [prepare(dataset, FAMILIES[args.arch]) for dataset in datasets]
    statuses: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    missing: list[str] = []

    def report(outcome: Outcome, say: Callable[[str], None]) -> None:
        statuses[outcome.status] += 1
        if outcome.source:
            sources[outcome.source] += 1
        if outcome.source == "full" and len(missing) < MISSING_SHOWN:
            missing.append(outcome.item.stem)
        if outcome.message:
            say(f"masked-loss cache: {outcome.message}")

    if args.encode is not None:
        seen: Counter[str] = Counter()
        run_caching_script(args, prepared, lambda outcome: seen.update([outcome.status]))
        print(f"{seen['written']} caches encoded and masked; now those that were there before", file=sys.stderr)
        prepared = [prepare(dataset, FAMILIES[args.arch]) for dataset in datasets]
    if not any(one.items for one in prepared):
        raise no_caches(datasets, args.arch)
    jobs = ((one, job) for one in prepared for job in one.jobs())

    def work(job):
        one, items = job
        if args.remove:
            return [remove_weights(item, args.dry_run, args.debug) for item in items]
        return inject(one, items, dtype=args.dtype, dry_run=args.dry_run, force=args.force, debug=args.debug)

    with Progress("masks", sum(len(one.items) for one in prepared)) as progress:
        for outcomes in run_parallel(work, jobs, args.workers or default_workers()):
            for outcome in outcomes:
                report(outcome, progress.say)
            progress.advance(len(outcomes))
    names = {"written": "masks written", "unchanged": "up to date", "removed": "masks removed", "problem": "problems"}
    if args.dry_run:
        names |= {"written": "masks would be written", "removed": "masks would be removed"}
    counts = ", ".join(f"{statuses[key]} {name}" for key, name in names.items() if statuses[key])
    print(f"{'Dry run, nothing changed: ' if args.dry_run else ''}{counts} ({progress.rate:.1f} images/s)")
    unread = [path for dataset in prepared for path in unread_of(dataset)]
    if unread:
        shown = ", ".join(path.name for path in unread[:MISSING_SHOWN])
        print(
            printable(f"{len(unread)} files of formats that are not read: {shown}: save them as PNG or MP4"),
            file=sys.stderr,
        )
    if sources:
        print("Masks from: " + ", ".join(f"{source} {count}" for source, count in sorted(sources.items())))
    if missing:
        more = sources["full"] - len(missing)
        print(printable(f"Full weight, no mask: {', '.join(sorted(missing))}{f' and {more} more' if more else ''}"))
    return 1 if statuses["problem"] else 0
