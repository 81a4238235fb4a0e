"""One command at a time writes in a folder, on this machine and, where the file system has locks, on others.

A lock is the system's own on an open file, so it goes with the process, however that ends. What the lock file says is for
people: who holds it. Where the file system has no locks, a file that is created exclusively takes their place, and is
removed only when the process that made it is known to be dead.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import functools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from masked_loss_triton.errors import UserError

LOCK_NAME = ".masked_loss.lock"
LONGEST_WAIT, POLL = 600.0, 0.1  # seconds
PARTY_PATIENCE = 1.0  # seconds before a wait is told: the first of a party shuts out the second for a moment
# Binary: Windows would change the ends of lines.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


@contextlib.contextmanager
def folder_lock(
    folders: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    command: str,
    *,
    party: str = "",
    name: str = LOCK_NAME,
    longest_wait: float = LONGEST_WAIT,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Iterator[None]:
    """Holds the lock of one folder, or of several, while the block runs; the lock ends with its process, also after kill -9.

    Who finds it taken says once for whom it waits. Folders that are absent, or that may not be written, are not locked:
    nothing can be written there. Use it round everything that decides what to write and writes it:

        with folder_lock(args.masks, "masked-loss generate"):
            ...

    A folder is the one that its path leads to: sub-folders have their own locks. Not for threads or for a block inside
    another one: a process that asks twice for the same folder waits for itself.

    Args:
        folders: one folder or several.
        command: what others are told.
        party: several processes that name the same party hold the lock together, and keep all others out. Where the system
            has no shared locks (Windows) they take turns; where the file system has none, it is free when the first ends.
        name: of the lock file.
        longest_wait: seconds.
        say: prints the line about waiting.

    Raises:
        UserError: naming the holder, when it is still held after `longest_wait`.
    """
    paths = [folders] if isinstance(folders, (str, os.PathLike)) else folders
    with contextlib.ExitStack() as stack:
        # Always in the same order: two commands with the same folders must not wait for each other.
        for folder in sorted({os.path.realpath(path) for path in paths}):
            lock = _wait_for(Path(folder) / name, command, party, longest_wait, say)
            if lock is not None:
                stack.callback(_release, *lock, bool(party))
        yield


def try_lock(descriptor: int, shared: bool = False) -> bool | None:
    """Takes the lock of an open file or folder without waiting, exclusively if not `shared`; closing the file gives it back.

    Returns:
        True: taken. False: another process has it. None: this system or file system has no locks.
    """
    if sys.platform == "win32":
        import msvcrt

        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        # Far behind what is in the file: a locked byte cannot be read there by others.
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, position, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@functools.cache
def machine() -> str:
    """The name of this machine and a mark of its running kernel, for file names: equal only where locks are shared.

    A host name alone may be that of many machines, and a kernel is that of many containers: their locks are the same ones.
    """
    host = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())[:40] or "host"
    return f"{host}-{_boot()[:12] or 'unknown'}"


@functools.cache
def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    return ""


def _process(pid: int | str) -> str:
    """What names a process for ever: kernel, namespace of process numbers, number and start. "" where it cannot be known."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):  # the numbers of another namespace
            return ""
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{_boot()}:{os.readlink('/proc/self/ns/pid')}:{started}"
    except OSError:
        return ""


def _wait_for(
    path: Path, command: str, party: str, longest_wait: float, say: Callable[[str], None]
) -> tuple[Path | None, int | None] | None:
    """The lock file, None where it is another's, and its descriptor, None where a file takes the place of a lock; None where
    nothing can be locked."""
    started, said = time.monotonic(), False
    while True:
        try:
            lock = _acquire(path, command, party)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS):
                return None
            raise UserError(f"{path.parent} cannot be locked ({error.strerror})") from error
        if lock is not None:
            return lock
        waited = time.monotonic() - started
        if waited >= longest_wait:
            raise UserError(f"{path.parent} is in use by {_holder(path)}: run this again when that has ended")
        if not said and (waited > PARTY_PATIENCE or not party):
            said = True
            say(f"{command}: waits for {_holder(path)}, which writes in {path.parent}")
        time.sleep(POLL)


def _acquire(path: Path, command: str, party: str) -> tuple[Path | None, int | None] | None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_FOLLOW, 0o666)
    except PermissionError:
        # Another user's lock file, left by a kill: it can be locked without being written.
        descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW)
    keep = False
    try:
        locked = try_lock(descriptor)
        if locked is None:
            with contextlib.suppress(OSError):
                os.unlink(path)
            return _acquire_without_locks(path.with_name(f"{path.name}.held"), command, party)
        joins = not locked and bool(party and try_lock(descriptor, shared=True))
        # Who had it before has removed the file: the lock of a file that has no name keeps nobody out.
        with contextlib.suppress(FileNotFoundError):
            keep = (locked or joins) and os.path.samestat(os.stat(path), os.fstat(descriptor))
        if keep and joins:
            keep = _read(path).get("party") == party
        elif keep:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _about(command, party))
            keep = not party or try_lock(descriptor, shared=True) is True
        return (path, descriptor) if keep else None
    finally:
        if not keep:
            os.close(descriptor)


def _acquire_without_locks(path: Path, command: str, party: str) -> tuple[Path | None, None] | None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o666)
    except FileExistsError:
        holder = _read(path)
        if party and holder.get("party") == party:
            return None, None
        known = str(holder.get("process", ""))
        here = _process(os.getpid()).rpartition(":")[0]
        # Dead for certain: of this kernel and namespace, and no process of this number began then.
        if here and known.startswith(f"{here}:") and _process(holder.get("pid", 0)) != known:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return None
    with os.fdopen(descriptor, "wb") as file:
        file.write(_about(command, party))
    return path, None


def _about(command: str, party: str) -> bytes:
    about = {
        "command": command,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "process": _process(os.getpid()),
        "party": party,
    }
    return json.dumps(about).encode()


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        about = json.loads(path.read_bytes())
        if isinstance(about, dict):
            return about
    return {}


def _holder(path: Path) -> str:
    held = path.with_name(f"{path.name}.held")
    about = _read(held) or _read(path)
    if not about:
        return "another process"
    end = f"; if it is dead, delete {held}" if held.exists() else ""
    return (
        f"{about.get('command')} (process {about.get('pid')} on {about.get('host')}, since {about.get('since')}{end})"
    )


def _release(path: Path | None, descriptor: int | None, shared: bool) -> None:
    """Removes the lock file while the lock is held by nobody else, so that no other's is removed, and gives the lock back."""
    if shared and descriptor is not None and not try_lock(descriptor):
        path = None
    if descriptor is not None and os.name == "nt":  # an open file cannot be removed there
        os.close(descriptor)
    if path is not None:
        with contextlib.suppress(OSError):
            os.unlink(path)
    if descriptor is not None and os.name != "nt":
        os.close(descriptor)
