"""Long work that the page starts and watches: one at a time, with its progress and its last line."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from masked_loss_triton.edit.clicks import Selector
from masked_loss_triton.edit.entries import Entry
from masked_loss_triton.edit.library import CARRIED, Library
from masked_loss_triton.errors import UserError

PROGRESS = re.compile(r"masks \[?.*?\b(\d+)/(\d+)\b")  # a line of the command's progress bar


class Busy(UserError):
    """Other work is still running."""


class Task:
    """What runs in the background: its name, done and total steps, and what it said at the end."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.name, self.done, self.total, self.running, self.failed = "", 0, 0, False, False
        self.text = ""

    def start(self, name: str, total: int, work: Callable[[Task], str]) -> None:
        """Runs `work` in a thread; it counts `done` up and returns the last line.

        Raises:
            Busy: when something runs.
        """
        with self.lock:
            if self.running:
                raise Busy(f"{self.name} is still running: wait for it")
            self.name, self.done, self.total, self.running, self.failed, self.text = name, 0, total, True, False, ""
        threading.Thread(target=self._run, args=(work,), daemon=True).start()

    def _run(self, work: Callable[[Task], str]) -> None:
        try:
            text, failed = work(self), False
        except UserError as error:
            text, failed = str(error), True
        except Exception as error:
            text, failed = f"{type(error).__name__}: {error}", True
        with self.lock:
            self.text, self.failed, self.running = text, failed, False

    def state(self) -> dict[str, Any]:
        """Everything the page shows of it."""
        with self.lock:
            names = ("name", "done", "total", "running", "failed", "text")
            return {name: getattr(self, name) for name in names}


def carry(library: Library, entry: Entry, selector: Selector, frame: int, last: int, saved: Callable[[], Any]) -> Any:
    """Returns the work of carrying the mask of one frame of a clip to its neighbours, up to `last`, forwards or backwards.

    Args:
        library: where frames and masks come from and go to.
        entry: the clip.
        selector: what follows the mask.
        frame: whose mask is carried.
        last: the last frame that gets it.
        saved: called when all is written.
    """

    def work(task: Task) -> str:
        step = 1 if last > frame else -1
        numbers = list(range(frame, last + step, step))
        drawn = next((number for number in numbers[1:] if library.is_drawn_frame(entry, number)), None)
        if drawn is not None:
            numbers = numbers[: numbers.index(drawn)]
        stopped = "" if drawn is None else f"; frame {drawn} was drawn, and stays"
        if len(numbers) < 2:
            raise UserError(f"frame {drawn} was drawn: it is not written over")
        pictures = [library.picture(entry, number) for number in numbers]
        mask = library.mask(entry, frame).pixels
        # All masks first: SAM 2's follow one another in its memory.
        for number, pixels in zip(numbers[1:], selector.follow(pictures, mask), strict=True):
            library.save(entry, pixels, None, number, CARRIED)
            task.done += 1
        saved()
        return f"carried frame {frame} to frames {min(numbers[1:])} to {max(numbers[1:])}{stopped}"

    return work


def write_caches(words: list[str]) -> Callable[[Task], str]:
    """Returns the work of `masked-loss cache` with these words of a command line, in a process of its own; its report is the last
    text."""

    def work(task: Task) -> str:
        command = [sys.executable, "-m", "masked_loss_triton", "cache", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                if counted := PROGRESS.match(line):
                    task.done, task.total = int(counted[1]), int(counted[2])
                else:
                    said.append(line.rstrip())
        if process.returncode:
            raise UserError("\n".join(said))
        return "\n".join(said)

    return work
