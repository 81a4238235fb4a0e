"""The bar is there at once, promises nothing before it knows, and ends as the time that the work took."""

import contextlib
import io
import re

import pytest

from masked_loss_triton.files import progress
from masked_loss_triton.files.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _show_all(monkeypatch):
    monkeypatch.setattr(progress, "TERMINAL_INTERVAL", 0.0)


def lines(stream):
    return stream.getvalue().split("\r\x1b[K")[1:]


def test_a_terminal_sees_the_bar_from_the_beginning():
    with contextlib.redirect_stderr(Terminal()) as terminal, Progress("masks", 2) as bar:
        assert lines(terminal) == [f"masks [{'.' * 24}] 0/2"]
        bar.advance(note="a.png")
        assert re.fullmatch(r"masks \[#{12}\.{12}\] 1/2  [\d.]+/s  \d+ s left  a.png", lines(terminal)[1])
        bar.say("a.png is damaged")
        bar.advance()
    assert lines(terminal)[2] == "a.png is damaged\n"
    assert re.fullmatch(r"masks 2/2 in [\d.]+ s\n", lines(terminal)[-1])


def test_an_interruption_before_the_first_item_promises_nothing():
    terminal = Terminal()
    with contextlib.redirect_stderr(terminal), contextlib.suppress(KeyboardInterrupt), Progress("m", 9) as bar:
        bar.advance(0)
        raise KeyboardInterrupt
    assert "left" not in terminal.getvalue()
    assert re.fullmatch(r"m 0/9, ended after [\d.]+ s\n", lines(terminal)[-1])


def test_a_log_gets_a_line_now_and_then_and_nothing_for_short_work(monkeypatch, capsys):
    with Progress("masks", 3) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.0)
    with Progress("masks", 3) as bar:
        bar.advance(3)
    first, last = capsys.readouterr().err.splitlines()
    assert "3/3" in first
    assert re.fullmatch(r"masks 3/3 in [\d.]+ s", last)
