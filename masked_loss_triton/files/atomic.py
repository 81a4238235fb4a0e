"""Writing files so that a crash, a full disk or a kill leaves the old or the new contents, never half.

The new contents go to a temporary file in the same folder, to the disk, and then over the old name in one step.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from masked_loss_triton.errors import UserError

# Not *.safetensors or *.png: the trainers look for files by their ending and would train on half a file.
TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.masktmp")


def replace_file(path: str | os.PathLike[str], write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write(file)` on a temporary file in the same folder, brings it to the disk and puts it in place of `path`.

    Raises:
        UserError: naming the file, when it cannot be written. The old file stays, the temporary one goes.
    """
    # A link keeps pointing where it did: the file it points to is replaced.
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.masktmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            if target.exists():
                shutil.copymode(target, temporary)
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): the old file is unchanged") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Deletes temporary files that a killed run left in a folder; those of running processes stay. Returns how many."""
    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = TEMPORARY.fullmatch(entry.name)
            if match and not is_running(int(match["pid"])):
                with contextlib.suppress(OSError):
                    if stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                        os.unlink(entry.path)
                        removed += 1
    return removed


def is_running(pid: int) -> bool:
    """Whether another process of this number runs; this one does not count."""
    if pid == os.getpid():
        return False
    if os.name == "nt":  # os.kill would end the process there
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
