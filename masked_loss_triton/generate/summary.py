"""What a run says at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from masked_loss_triton.files.progress import printable
from masked_loss_triton.generate.writing import read_note

if TYPE_CHECKING:
    from masked_loss_triton.generate.jobs import Job
    from masked_loss_triton.generate.work import Outcome


class Summary:
    """Counts what was done; problems are told when they occur, pictures without a detection at the end."""

    def __init__(self) -> None:
        self.kept, self.other_settings = 0, 0
        self.means: list[float] = []
        self.nothing: list[str] = []
        self.problems: list[str] = []
        self.rate = 0.0
        self.sheet = ""

    def keep(self, jobs: list[Job], settings: dict[str, Any]) -> None:
        """Notes the masks that are there already, and whether they were made with these settings."""
        self.kept = len(jobs)
        for job in jobs:
            mask = job.existing()
            note = read_note(mask) if mask is not None else None
            if note is None:  # made by hand, or by another program
                continue
            self.other_settings += any(note.get(key) != value for key, value in settings.items())
            if note.get("fallback"):
                self.nothing.append(str(job.source))

    def add(self, outcome: Outcome, say: Callable[[str], None]) -> None:
        """Counts one outcome; `say` prints its problem."""
        if outcome.status == "written":
            self.means.append(outcome.mean)
        elif outcome.status == "nothing":
            self.nothing.append(str(outcome.job.source))
        else:
            self.problem(outcome.message, say)

    def problem(self, message: str, say: Callable[[str], None] = print) -> None:
        """Tells and counts a problem."""
        self.problems.append(message)
        say(printable(f"masked-loss generate: {message}"))

    def show(self) -> None:
        """Prints it."""
        counts = [f"{len(self.means)} masks written"]
        if self.kept:
            counts.append(f"{self.kept} already there")
        counts += [f"{len(self.nothing)} without a detection", f"{len(self.problems)} problems"]
        print(f"{', '.join(counts)} ({self.rate:.1f}/s)")
        if self.means:
            mean = sum(self.means) / len(self.means)
            print(f"Mean weight {mean:.1%}, {min(self.means):.1%} to {max(self.means):.1%}")
        for name in sorted(self.nothing):
            print(printable(f"Nothing found: {name}"))
        if self.other_settings:
            print(
                f"{self.other_settings} of those already there were made with other settings: --overwrite makes them again"
            )
        if self.sheet:
            print(printable(self.sheet))
