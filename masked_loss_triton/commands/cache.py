"""`masked-loss cache`: mask weights into the latent caches of musubi-tuner. No VAE runs."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from masked_loss_triton.cache.dataset import Dataset
    from masked_loss_triton.cache.inject import Outcome, Prepared
    from masked_loss_triton.files.shard import Shard

HELP = "Add mask weights to existing latent caches, without encoding anything again."
EXAMPLE = "masked-loss cache --dataset_config dataset.toml --alpha_mask --masks masks"
NAMES_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from masked_loss_triton.commands.arguments import add_dataset_arguments, add_workers_argument
    from masked_loss_triton.commands.farm import add_engine_arguments, add_shard_argument

    add_dataset_arguments(parser)
    machines = parser.add_argument_group("several machines or workers")
    add_shard_argument(machines)
    add_engine_arguments(machines)
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of the weights")
    add_workers_argument(
        parser, "threads (default: four per core, at most 16), or workers of Ray (default: one a core)"
    )
    parser.add_argument("--dry_run", action="store_true", help="say what would be done and change nothing")
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
    from masked_loss_triton.commands.farm import ray_options, shard_of
    from masked_loss_triton.errors import UserError
    from masked_loss_triton.files.atomic import remove_leftovers
    from masked_loss_triton.files.shard import shard_lock

    if args.encode is not None and (args.remove or args.dry_run):
        raise UserError("--encode writes caches: leave out --remove and --dry_run", 2)
    shard, ray = shard_of(args), ray_options(args)
    if args.encode is not None and (args.shard is not None or ray is not None):
        raise UserError("--encode runs the trainer's script on everything, here: leave out --shard and --engine", 2)
    datasets = datasets_from(args, need_source=not args.remove)
    if args.dry_run:
        return _cache(args, datasets, shard, None)
    folders = [dataset.cache_directory for dataset in datasets]
    for folder in folders if args.encode is not None else ():
        os.makedirs(folder, exist_ok=True)  # as the script does: there is nothing to lock before
    with shard_lock(folders, "masked-loss cache", shard, ray["run"] if ray is not None else ""):
        for folder in folders:
            remove_leftovers(folder)
        status = _cache(args, datasets, shard, ray)
        for folder in folders if ray is not None else ():
            remove_leftovers(folder)  # of workers that died
        return status


def _cache(args: argparse.Namespace, datasets: list[Dataset], shard: Shard, ray: dict[str, Any] | None) -> int:
    from masked_loss_triton.cache.families import FAMILIES
    from masked_loss_triton.cache.inject import inject_all, prepare
    from masked_loss_triton.cache.items import choose_family, no_caches
    from masked_loss_triton.files.progress import Progress

    args.arch = choose_family(datasets, args.arch)
    prepared = [prepare(dataset, FAMILIES[args.arch]) for dataset in datasets]
    if args.encode is not None:
        _encode(args, prepared)
        prepared = [prepare(dataset, FAMILIES[args.arch]) for dataset in datasets]
    if not any(dataset.items for dataset in prepared):
        raise no_caches(datasets, args.arch)
    prepared = [dataset.part(shard) for dataset in prepared]
    options = {name: getattr(args, name) for name in ("remove", "dtype", "dry_run", "force", "debug")}
    if ray is None:
        finished = inject_all(prepared, workers=args.workers, **options)
    else:
        from masked_loss_triton.cache.on_ray import inject_on_ray

        finished = inject_on_ray(prepared, shard, options=options, **ray)
    summary = Summary()
    with Progress("masks", sum(len(dataset.items) for dataset in prepared)) as progress:
        for outcome in finished:
            summary.add(outcome)
            if outcome.message:
                progress.say(f"masked-loss cache: {outcome.message}")
            progress.advance()
    summary.show(prepared, args.dry_run, progress.rate)
    return 1 if summary.statuses["problem"] else 0


def _encode(args: argparse.Namespace, prepared: list[Prepared]) -> None:
    from masked_loss_triton.cache.encode import run_caching_script

    statuses: Counter[str] = Counter()
    run_caching_script(args, prepared, lambda outcome: statuses.update([outcome.status]))
    print(f"{statuses['written']} caches encoded and masked; now those that were there before", file=sys.stderr)


class Summary:
    """Counts what happened to each cache and from where its mask came, and keeps the names of some that have none."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.sources: Counter[str] = Counter()
        self.missing: list[str] = []

    def add(self, outcome: Outcome) -> None:
        self.statuses[outcome.status] += 1
        if outcome.source:
            self.sources[outcome.source] += 1
        if outcome.source == "full" and len(self.missing) < NAMES_SHOWN:
            self.missing.append(outcome.item.stem)

    def show(self, prepared: list[Prepared], dry_run: bool, rate: float) -> None:
        from masked_loss_triton.cache.inject import unread_of
        from masked_loss_triton.files.progress import printable

        would = "would be " if dry_run else ""
        names = {"written": f"masks {would}written", "unchanged": "up to date", "removed": f"masks {would}removed"}
        names["problem"] = "problems"
        counts = ", ".join(f"{self.statuses[key]} {name}" for key, name in names.items() if self.statuses[key])
        print(f"{'Dry run, nothing changed: ' if dry_run else ''}{counts} ({rate:.1f} images/s)")
        if self.sources:
            print("Masks from: " + ", ".join(f"{source} {count}" for source, count in sorted(self.sources.items())))
        if self.missing:
            print(printable(f"Full weight, no mask: {_some(sorted(self.missing), self.sources['full'])}"))
        unread = [path.name for dataset in prepared for path in unread_of(dataset)]
        if unread:
            line = f"{len(unread)} files of formats that are not read: {_some(unread, len(unread))}: save them as PNG or MP4"
            print(printable(line), file=sys.stderr)


def _some(names: list[str], total: int) -> str:
    shown = names[:NAMES_SHOWN]
    return ", ".join(shown) + (f" and {total - len(shown)} more" if total > len(shown) else "")
