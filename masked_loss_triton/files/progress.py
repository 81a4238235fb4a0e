"""A progress bar on standard error: one line on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

TERMINAL_INTERVAL, LOG_INTERVAL = 0.1, 10.0


def printable(text: str) -> str:
    """Text that standard output can take: file names may hold bytes that are no characters there."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Progress:
    """Counts to `total`. Lines for the user that come in between go through `say`, so that the bar stays whole."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self.started = time.perf_counter()
        self.terminal = sys.stderr.isatty()
        self.shown = self.started

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.terminal and self.total:
            self._show("\n")

    @property
    def rate(self) -> float:
        """Items per second so far."""
        return self.done / max(time.perf_counter() - self.started, 1e-9)

    def advance(self, count: int = 1) -> None:
        """Counts some items as done."""
        self.done += count
        now = time.perf_counter()
        if now - self.shown >= (TERMINAL_INTERVAL if self.terminal else LOG_INTERVAL):
            self.shown = now
            self._show("" if self.terminal else "\n")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        print(("\r\x1b[K" if self.terminal else "") + line, file=sys.stderr, flush=True)

    def _show(self, end: str) -> None:
        filled = 24 * self.done // max(self.total, 1)
        bar = "#" * filled + "." * (24 - filled)
        left = (self.total - self.done) / max(self.rate, 1e-9)
        line = f"{self.label} [{bar}] {self.done}/{self.total}  {self.rate:.1f}/s  {left:.0f} s left"
        print(("\r\x1b[K" if self.terminal else "") + line, end=end, file=sys.stderr, flush=True)
