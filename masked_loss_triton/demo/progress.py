"""One line of progress on stderr: rewritten in place on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TextIO

BAR = 24  # characters
REFRESH = 0.1  # seconds


class Progress:
    """Counts stages, and the steps of the current one.

    >>> with Progress(total_stages=2) as progress:
    ...     progress.stage("reading", steps=3)
    ...     progress.step(1)
    """

    def __init__(self, total_stages: int, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.total_stages = total_stages
        self.number = 0
        self.seconds: dict[str, float] = {}  # of each stage that is over
        self._title: str | None = None
        self._steps = self._step = 0
        self._start = self._drawn = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish()
        elif self.live and self._title:
            self.stream.write("\n")  # so that the error message does not follow the bar on its line

    def stage(self, title: str, steps: int = 0) -> None:
        """Ends the stage before and begins the next."""
        self._finish()
        self.number += 1
        self._title, self._steps, self._step = title, steps, 0
        self._start, self._drawn = time.perf_counter(), 0.0
        self._draw()

    def step(self, step: int, note: str = "") -> None:
        """`step` steps of the stage are done; `note` is shown behind the bar."""
        self._step = step
        if time.perf_counter() - self._drawn > REFRESH:
            self._draw(note)

    def warn(self, message: str) -> None:
        """A line for the user that stays on the screen."""
        self.stream.write(f"\r\x1b[K{message}\n" if self.live else f"{message}\n")
        self._draw()

    def _head(self) -> str:
        return f"[{self.number}/{self.total_stages}] {self._title:<28}"

    def _draw(self, note: str = "") -> None:
        if not self.live or self._title is None:
            return
        self._drawn = time.perf_counter()
        text = self._head()
        if self._steps:
            done = BAR * self._step // self._steps
            text += f" {'━' * done}{'╌' * (BAR - done)} {self._step}/{self._steps} {note}"
        self.stream.write(f"\r\x1b[K{text}")
        self.stream.flush()

    def _finish(self) -> None:
        if self._title is None:
            return
        seconds = time.perf_counter() - self._start
        self.seconds[self._title] = seconds
        line = f"{self._head()} {seconds:5.1f} s"
        self.stream.write(f"\r\x1b[K{line}\n" if self.live else f"{line}\n")
        self.stream.flush()
        self._title = None
