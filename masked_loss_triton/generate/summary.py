"""Counts what a run of generate did, and prints it at the end."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from masked_loss_triton.files.progress import printable, speed
from masked_loss_triton.generate.batches import Done, Generation
from masked_loss_triton.generate.jobs import Job
from masked_loss_triton.generate.mask_files import read_note
from masked_loss_triton.generate.quality import marks_of
from masked_loss_triton.masks.reading import unread_text

MOST_NAMES = 10


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Summary:
    """Counts what was done; problems are told when they occur, pictures without a detection at the end."""

    def __init__(self) -> None:
        self.present, self.other_settings = 0, 0
        self.means: list[float] = []
        self.undetected = 0
        self.doubtful: dict[str, Sequence[str]] = {}
        self.nothing: list[str] = []
        self.problems: list[str] = []
        self.drawn: list[str] = []
        self.no_pictures = 0
        self.rate = 0.0
        self.ends: list[str] = []

    def add_present(self, jobs: list[Job], generation: Generation) -> None:
        """Counts the masks that are there already, and those that were made with other settings."""
        self.present = len(jobs)
        wanted = generation.note()
        for job in jobs:
            note = read_note(job.masks[0])
            if note is None:  # made by hand, or by another program
                continue
            self.other_settings += any(note.get(key) != value for key, value in wanted.items())
            if note.get("fallback"):
                self.nothing.append(str(job.source))
            elif marks := marks_of(job):
                self.doubtful[str(job.source)] = marks

    def add(self, done: Done, say: Callable[[str], None] = _say) -> None:
        """Counts one job; `say` prints its problem."""
        if done.status == "written":
            self.means.append(done.mean)
            self.undetected += not done.detected
            if done.marks:
                self.doubtful[str(done.job.source)] = done.marks
        elif done.status == "nothing":
            self.nothing.append(f"{done.job.source}{f' ({done.message})' if done.message else ''}")
        elif done.status == "kept":
            self.drawn.append(str(done.job.mask()))
        elif done.status == "no picture":
            self.no_pictures += 1
        else:
            self.add_problem(done.message, say)

    def add_problem(self, message: str, say: Callable[[str], None] = _say) -> None:
        """Tells and counts a problem."""
        self.problems.append(message)
        say(printable(f"masked-loss generate: {message}"))

    def add_unread(self, unread: Counter[str]) -> None:
        """Notes pictures in formats that are not read."""
        if unread:
            self.ends.append(f"Skipped: {unread_text(unread)}")

    def add_copies(self, folder: Path) -> None:
        """Notes where the masks are that were drawn by hand and have been replaced."""
        if folder.is_dir():
            self.ends.append(f"Masks that were not made by generate have been replaced: copies in {folder}")

    def show(self) -> None:
        """Prints the counts, the mean weight, and what the user should look at."""
        counts = [f"{len(self.means)} masks written"]
        if self.present or self.drawn:
            counts.append(f"{self.present + len(self.drawn)} already there")
        counts += [f"{len(self.nothing)} without a detection", f"{len(self.problems)} problems"]
        print(f"{', '.join(counts)} ({speed(self.rate)})")
        if self.means:
            mean = sum(self.means) / len(self.means)
            print(f"Mean weight {mean:.1%}, {min(self.means):.1%} to {max(self.means):.1%}")
        if self.undetected:
            print(f"{self.undetected} of a box that was given: nothing was looked for; look at them")
        for name in sorted(self.nothing):
            print(printable(f"Nothing found: {name}"))
        worst = sorted(self.doubtful, key=lambda name: (-len(self.doubtful[name]), name))
        for name in worst[:MOST_NAMES]:
            print(printable(f"Look at {name}: {'; '.join(self.doubtful[name])}"))
        if len(worst) > MOST_NAMES:
            print(f"and at {len(worst) - MOST_NAMES} more: the sheet shows the worst first")
        for name in sorted(self.drawn)[:MOST_NAMES]:
            print(printable(f"Kept, not made by generate: {name}"))
        if self.drawn:
            print(f"{len(self.drawn)} kept: --overwrite drawn replaces them too, and keeps copies")
        if self.other_settings:
            print(
                f"{self.other_settings} of those already there were made with other settings: --overwrite makes them again"
            )
        if self.no_pictures:
            print(f"{self.no_pictures} masks and contact sheets of earlier runs among the pictures: passed over")
        for line in self.ends:
            print(printable(line))
