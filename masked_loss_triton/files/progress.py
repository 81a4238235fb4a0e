"""A progress bar on standard error: one line that is drawn again on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time

TERMINAL_INTERVAL, LOG_INTERVAL = 0.1, 10.0  # seconds
BAR = 24  # characters


def printable(text: str) -> str:
    """Text that a terminal can take: file names may hold line breaks, escape sequences and bytes that are no characters."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text.encode(encoding, "backslashreplace").decode(encoding)


def speed(rate: float) -> str:
    """Items per second, or where they take longer than a second, seconds for each."""
    return f"{rate:.1f}/s" if rate >= 1 or not rate else f"{1 / rate:.1f} s each"


class Progress:
    """Counts items of work, and shows how many are done, how fast, and how long the rest will take.

    On a terminal the bar is there from the beginning, and ends as the time that the work took.

    Args:
        label: what is done.
        total: number of items, or 0 for work that is not counted.
    """

    def __init__(self, label: str, total: int = 0) -> None:
        self.label, self.total, self.done = label, total, 0
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.perf_counter()

    def __enter__(self) -> Progress:
        if self.terminal:
            self._print(self._bar(""), "")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        counted = f" {self.done}/{self.total}" if self.total else ""
        if self.terminal or self.shown > self.started:
            self._print(f"{self.label}{counted}{' in' if kind is None else ', ended after'} {self.seconds:.1f} s", "\n")

    @property
    def seconds(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.started

    @property
    def rate(self) -> float:
        """Items per second so far."""
        return self.done / max(self.seconds, 1e-9)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts some items as done; `note` is shown behind the bar."""
        self.done += count
        now = time.perf_counter()
        if now - self.shown >= (TERMINAL_INTERVAL if self.terminal else LOG_INTERVAL):
            self.shown = now
            self._print(self._bar(note), "" if self.terminal else "\n")

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        self._print(printable(line), "\n")

    def _bar(self, note: str) -> str:
        if not self.total:
            return f"{self.label} {note}"
        filled = BAR * min(self.done, self.total) // self.total
        line = f"{self.label} [{'#' * filled}{'.' * (BAR - filled)}] {self.done}/{self.total}"
        if self.done:  # before the first one is done nobody knows how long one takes
            line += f"  {speed(self.rate)}  {max(self.total - self.done, 0) / self.rate:.0f} s left"
        return f"{line}  {note}" if note else line

    def _print(self, line: str, end: str) -> None:
        print(("\r\x1b[K" if self.terminal else "") + line, end=end, file=sys.stderr, flush=True)
