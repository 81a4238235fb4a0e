"""The code blocks of the pages: where they stand, what they hold, and the reason where one cannot run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]
LANGUAGES = ("console", "python", "toml", "text")
FENCE = re.compile(r"^```(?P<language>\S*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
REASON = re.compile(r"<!-- not run: (?P<reason>[^>]{20,}) -->\n+\Z")
# A line indented by four spaces after an empty one is code as well, unless it goes on with an item of a list.
INDENTED = re.compile(r"^(?!\s*(?:[-*|]|\d+\.)\s).*\S.*\n\n(?P<text> {4}[^\s|].*)", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: of the page on which it begins.
        reason: of the comment above it, why it cannot run; "" without one.
    """

    page: str
    line: int
    language: str
    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Line:
    """A command of a console block, and what the page says that it prints.

    Attributes:
        words: as a shell would split them, without environment variables and redirection.
        comment: what stands behind #.
        into: the file that its output goes to; "" for the screen.
    """

    words: tuple[str, ...]
    comment: str
    into: str
    output: tuple[str, ...]

    @property
    def command(self) -> str:
        return " ".join(self.words)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    text = read(page)
    found = []
    for match in FENCE.finditer(text):
        reason = REASON.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, match["language"], match["text"], reason["reason"] if reason else ""))
    return found


def without_blocks(page: str) -> str:
    """The page's text without code, in which a # begins a heading."""
    return FENCE.sub("", read(page))


def lines(block: Block) -> list[Line]:
    """The commands of a console block. A line that ends in a backslash goes on."""
    found: list[Line] = []
    for text in block.text.replace("\\\n", " ").splitlines():
        if not text.startswith("$ "):
            assert found, f"{block}: output before the first command, which begins with '$ '"
            found[-1] = Line(found[-1].words, found[-1].comment, found[-1].into, (*found[-1].output, text))
            continue
        words = shlex.split(text[2:], comments=True)
        assert words, f"{block}: an empty command"
        for both in _commands(words):
            comment = text.rpartition(" #")[2].strip() if " #" in text else ""
            into = both[both.index(">") + 1] if ">" in both else ""
            both = both[: both.index(">")] if into else both
            found.append(Line(tuple(both), comment, into, ()))
    return found


def _commands(words: list[str]) -> list[list[str]]:
    """The commands that && joins, without NAME=VALUE before them."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            found.append([])
        elif found[-1] or not re.fullmatch(r"[A-Z_0-9]+=.*", word):
            found[-1].append(word)
    return found
