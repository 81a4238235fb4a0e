"""What `check` found in a data set or in some of its shards, kept so that shards put together are what one process finds."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from masked_loss_triton.cache.kinds import KINDS, Problem
from masked_loss_triton.errors import UserError
from masked_loss_triton.files.shard import WHOLE, Shard
from masked_loss_triton.masks.operations import MaskOperations

FORMAT = "masked_loss_triton check 1"


@dataclasses.dataclass(frozen=True)
class Findings:
    """The problems of datasets, sorted by kind and file, each once; how many caches were masked with which options, and have
    which labels in them."""

    problems: list[Problem]
    options: collections.Counter[str]
    labels: collections.Counter[str]


@dataclasses.dataclass
class CheckedDataset:
    """What was found in one dataset, or in one shard of it.

    Attributes:
        index: of the dataset in its file.
        cache_directory: of the dataset.
        asked: whether somebody said how masks are to be made.
        masked, unmasked: caches with weights, and those without.
        operations: with which operations, as JSON, how many caches were masked.
        labels: in how many caches each label covers something.
        problems: of single pictures, clips and caches, and of names.
    """

    index: int
    cache_directory: str
    asked: bool
    masked: int = 0
    unmasked: int = 0
    operations: dict[str, int] = dataclasses.field(default_factory=dict)
    labels: dict[str, int] = dataclasses.field(default_factory=dict)
    problems: list[Problem] = dataclasses.field(default_factory=list)

    def count_operations(self, text: str, count: int = 1) -> None:
        """Counts caches that were masked with these operations."""
        self.operations[text] = self.operations.get(text, 0) + count

    def count_labels(self, labels: Iterable[str], count: int = 1) -> None:
        """Counts caches that have these labels in them."""
        for label in labels:
            self.labels[label] = self.labels.get(label, 0) + count

    def add(self, other: CheckedDataset) -> None:
        """Takes in what another shard of the dataset found."""
        self.masked += other.masked
        self.unmasked += other.unmasked
        for text, count in other.operations.items():
            self.count_operations(text, count)
        for label, count in other.labels.items():
            self.count_labels([label], count)
        self.problems += other.problems

    def made_with(self) -> collections.Counter[MaskOperations]:
        """Counts the caches that were masked with each of the operations."""
        counts: collections.Counter[MaskOperations] = collections.Counter()
        for text, count in sorted(self.operations.items()):
            counts[MaskOperations(**json.loads(text))] += count
        return counts

    def all_problems(self) -> list[Problem]:
        """Returns the problems, with what only all caches together show."""
        # Nobody said how masks were to be made, and all were made in one way.
        agreed = not self.asked and len(self.made_with()) == 1
        found = [line for line in self.problems if not (agreed and line.kind == "options")]
        if self.masked and self.unmasked:
            counts = f"{self.masked} of {self.masked + self.unmasked} caches have weights: run masked-loss cache"
            found.append(Problem("mixed", self.cache_directory, counts, self.index))
        return found


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found in datasets, or in one shard of them.

    Attributes:
        shard: which part.
        pictures, caches: how many were looked at.
        options: names the datasets and how they were checked: shards that are put together must agree.
        ignored: kinds of problems to leave out.
        datasets: in the order of their file.
    """

    shard: Shard
    pictures: int
    caches: int
    options: str
    ignored: list[str]
    datasets: list[CheckedDataset]

    def findings(self, ignore: Collection[str] = ()) -> Findings:
        """Returns the problems, but not of ignored kinds, and the options of the caches."""
        order = {kind: index for index, kind in enumerate(KINDS)}
        found = [line for dataset in self.datasets for line in dataset.all_problems()]
        found = [line for line in found if line.kind not in (*ignore, *self.ignored)]
        found.sort(key=lambda line: (order[line.kind], line.file, line.dataset, line.message))
        # A mask that several layers or windows share is one problem.
        unique: dict[tuple[str, str], Problem] = {}
        for line in found:
            unique.setdefault((line.kind, line.file), line)
        options: collections.Counter[str] = collections.Counter()
        for dataset in self.datasets:
            for operations, count in dataset.made_with().items():
                options[str(operations)] += count
        labels: collections.Counter[str] = collections.Counter()
        for dataset in self.datasets:
            labels.update(dataset.labels)
        return Findings(list(unique.values()), options, labels)

    def to_json(self) -> dict[str, Any]:
        """Returns what `read_checked` reads, for `json.dumps`."""
        return {"format": FORMAT, **dataclasses.asdict(self), "shard": str(self.shard)}


def read_checked(path: str) -> Checked:
    """Reads what `check --json --shard I/N` printed.

    Raises:
        UserError: naming the file that is something else, with exit status 2.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise ValueError("of another version")
        index, count = found.pop("shard").split("/")
        datasets = [
            CheckedDataset(**{**one, "problems": [Problem(**line) for line in one["problems"]]})
            for one in found.pop("datasets")
        ]
        return Checked(shard=Shard(int(index), int(count)), datasets=datasets, **found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not the output of check --json --shard I/N"
        raise UserError(f"--merge {path} cannot be read ({reason}): give a file with that output", 2) from error


def merge(paths: Sequence[str]) -> Checked:
    """Puts the outputs of all shards together.

    Raises:
        UserError: for files that are none, of other options or numbers of shards, and for shards that are absent or double.
    """
    parts = [read_checked(path) for path in paths]
    first = parts[0]
    for path, part in zip(paths, parts, strict=True):
        for what, same in (
            ("number of shards", part.shard.count == first.shard.count),
            ("dataset file or other options", part.options == first.options),
        ):
            if not same:
                raise UserError(f"--merge {path} is of another {what} than {paths[0]}: check all shards alike", 2)
    count = first.shard.count
    seen = collections.Counter(part.shard.index for part in parts)
    _refuse("absent", count, (index for index in range(count) if not seen[index]), "run check --json --shard on it")
    _refuse("there twice", count, (index for index in seen if seen[index] > 1), "give each once")
    datasets = [CheckedDataset(one.index, one.cache_directory, one.asked) for one in first.datasets]
    for part in parts:
        for dataset, other in zip(datasets, part.datasets, strict=True):
            dataset.add(other)
    totals = sum(part.pictures for part in parts), sum(part.caches for part in parts)
    return Checked(WHOLE, *totals, first.options, first.ignored, datasets)


def _refuse(what: str, count: int, indices: Iterable[int], then: str) -> None:
    named = ", ".join(f"{index}/{count}" for index in sorted(indices))
    if named:
        raise UserError(f"--merge: shard {named} is {what}: {then}", 2)
