"""What is known of every mask: looked at in the background, so that the list is there at once and fills by itself."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.edit.library import Library, is_drawn
from masked_loss_triton.errors import UserError, problem_line
from masked_loss_triton.files.atomic import replace_file
from masked_loss_triton.files.parallel import default_workers, run_parallel
from masked_loss_triton.generate.quality import marks_of_clip, picture_marks

REVIEWED = ("", "ok", "fix")
NOTES = ".masked-loss-edit.json"  # in the folder of the masks: which ones a person has looked at
# Coverage beyond which a mask is shown among the doubtful ones: nearly nothing, nearly everything.
SMALL, LARGE = 0.005, 0.95


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was found out about one entry.

    Attributes:
        state: "missing", "drawn", "mask" (of somebody else), or "unreadable".
        coverage: mean of the mask, 0 to 1; of a clip that of its first, middle and last frame.
        problems: one line each, the worst first.
        marks: what is odd about a mask that nobody has drawn, one line each: hints.
    """

    state: str
    coverage: float | None
    problems: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def badness(self) -> float:
        """Orders the list: what cannot be read, problems, odd masks, none or all of a picture, the others by coverage."""
        if self.state == "unreadable":
            return 4
        if self.problems:
            return 3
        if self.marks:
            return 2.5
        coverage = self.coverage or 0
        return 2 if not SMALL < coverage < LARGE else abs(coverage - 0.5)


class Survey:
    """Looks at all entries in threads of its own, and keeps which ones were reviewed, over restarts.

    Args:
        library: the entries.
        folder: where the file of reviews lies.
    """

    def __init__(self, library: Library, folder: Path) -> None:
        self.library, self.file = library, folder / NOTES
        self.seen: dict[int, Seen] = {}
        self.changes: list[int] = []  # entries in the order in which something new was found
        self.problems: dict[int, list[str]] = {}
        self.lock = threading.Lock()
        self.reviewed = self._read_reviews()

    def start(self, check: Any = None) -> None:
        """Begins to look; `check`, if given, then adds the problems that it finds: (entry number, line) pairs."""
        threading.Thread(target=self._run, args=(check,), daemon=True).start()

    def _run(self, check: Any) -> None:
        for number in run_parallel(
            self._look_quietly, range(len(self.library.entries)), max(1, default_workers() // 4)
        ):
            with self.lock:
                self.changes.append(number)
        if check is not None:
            for number, line in check():
                with self.lock:
                    self.problems.setdefault(number, []).append(line)
                    self.changes.append(number)

    def _look_quietly(self, number: int) -> int:
        self.look(number)
        return number

    def look(self, number: int) -> None:
        """Finds out about one entry anew."""
        found = examine(self.library, number)
        with self.lock:
            self.seen[number] = found

    def changed(self, number: int) -> None:
        """Looks again at an entry that was saved, and forgets what `check` said of its old mask."""
        self.look(number)
        with self.lock:
            self.problems.pop(number, None)
            self.changes.append(number)

    def review(self, number: int, state: str) -> None:
        """Marks an entry as "ok", "fix" or "" (not looked at), on the disk.

        Raises:
            UserError: for another mark, or a folder that cannot be written.
        """
        if state not in REVIEWED:
            raise UserError(f"a mark is one of {', '.join(map(repr, REVIEWED))}, got {state!r}")
        with self.lock:
            # Another editor may have marked others meanwhile.
            self.reviewed = {**self._read_reviews(), self.library.entries[number].name: state}
            text = json.dumps({"reviewed": {name: mark for name, mark in self.reviewed.items() if mark}}, indent=0)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.file, lambda data: data.write(text.encode()))
            self.changes.append(number)

    def since(self, position: int) -> dict[str, Any]:
        """What is new after a position in `changes`: the facts of those entries, and the position to ask from next."""
        with self.lock:
            numbers = dict.fromkeys(self.changes[position:])
            return {
                "position": len(self.changes),
                "looked": len(self.seen),
                "total": len(self.library.entries),
                "facts": {number: self._facts(number) for number in numbers if number in self.seen},
            }

    def _facts(self, number: int) -> dict[str, Any]:
        seen = self.seen[number]
        seen = dataclasses.replace(seen, problems=(*seen.problems, *self.problems.get(number, ())))
        entry = self.library.entries[number]
        return {
            **dataclasses.asdict(seen),
            "badness": round(seen.badness, 4),
            "reviewed": self.reviewed.get(entry.name, ""),
        }

    def _read_reviews(self) -> dict[str, str]:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))["reviewed"]
            return {str(name): str(mark) for name, mark in found.items() if mark in REVIEWED}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, AttributeError):
            # Half of somebody else's file is no reason not to start; it is replaced at the next mark.
            return {}


def examine(library: Library, number: int) -> Seen:
    """Finds out about the masks of one entry. Whatever is wrong with its files becomes a line."""
    entry = library.entries[number]
    try:
        paths = [path for label in ("", *library.labels) if (path := library.entry(number, label).mask()) is not None]
        if not paths:
            library.size(entry)
            return Seen("missing", None)
        frames = [0]
        if entry.is_clip and any(path.is_dir() for path in paths):
            count = library.frame_count(entry)
            frames = sorted({0, count // 2, count - 1})
        found = [library.together(number, frame) for frame in frames]
        coverage = float(np.mean([mask.mean() / 255 for mask in found if mask is not None]))
        problems = ("nothing is masked: nothing is learned",) if coverage == 0 else ()
        if problems or any(map(is_drawn, paths)):
            return Seen("mask" if problems else "drawn", coverage, problems)
        if entry.is_clip:
            return Seen("mask", coverage, marks=tuple(mark for path in paths for mark in marks_of_clip(path)))
        assert found[0] is not None
        return Seen("mask", coverage, marks=tuple(picture_marks(library.picture(entry), found[0] > 127)))
    except UserError as error:
        return Seen("unreadable", None, (str(error),))
    except Exception as error:
        return Seen("unreadable", None, (problem_line(error, entry.source, False),))
