"""The error a user sees as one line; everything else is a bug and keeps its traceback."""

from __future__ import annotations

import importlib.metadata
import json
import urllib.parse
import urllib.request
from pathlib import Path


class UserError(Exception):
    """Something in the user's files or flags that the user can mend. The text names it, says what is wrong and what to do.

    `exit_status` is what the command line returns: 1 when the work found a problem, 2 when it was asked for wrongly.
    """

    def __init__(self, message: str, exit_status: int = 1) -> None:
        super().__init__(message)
        self.exit_status = exit_status


def install_command(extra: str) -> str:
    """The command that installs an extra, from where this package came from: the folder of a checkout, else an index.

    pip notes the folder in direct_url.json (PEP 610); a checkout that is used in place needs no note.
    """
    source, checkout = "masked_loss_triton", Path(__file__).parents[1]
    if (checkout / "pyproject.toml").is_file():
        return f"pip install '{checkout}[{extra}]'"
    try:
        noted = importlib.metadata.distribution(source).read_text("direct_url.json")
        address = urllib.parse.urlparse(json.loads(noted or "{}").get("url", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        address = urllib.parse.urlparse("")
    if address.scheme == "file" and not address.path.endswith((".whl", ".gz")):
        source = urllib.request.url2pathname(address.path)
    return f"pip install '{source}[{extra}]'"


def problem_line(error: Exception, subject: object, debug: bool = False) -> str:
    """Returns the one line for what went wrong with one of many files, so that the work on the others goes on.

    Args:
        error: a UserError, whose text names its file; anything else is described.
        subject: the file or item that was worked on.
        debug: raise what is no UserError again, with its traceback.
    """
    if isinstance(error, UserError):
        return str(error)
    if debug:
        raise error
    reason = " ".join(str(error).split())[:300]
    return f"{subject}: {type(error).__name__}{f': {reason}' if reason else ''} (--debug shows where)"
