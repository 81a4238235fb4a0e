"""Writing files so that a crash, a full disk or a kill leaves the old or the new contents, never half.

The new contents go to a temporary file in the same folder, to the disk, and then over the old name in one step. A temporary
file is locked as long as its process lives, and its name holds machine and chance: no two writers share one, in containers
or on a network file system either, and only what is certainly dead is cleaned up.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.locks import NO_FOLLOW, machine, try_lock

# Not *.safetensors or *.png: the trainers look for files by their ending and would train on half a file.
TEMPORARY = re.compile(r"\.(?P<name>.*)\.(?P<machine>[A-Za-z0-9-]+)\.[0-9a-f]{16}\.masktmp", re.DOTALL)
TWO_SECONDS = 2_000_000_000  # ns; the step of time on FAT
AT_FDCWD, RENAME_NOREPLACE, RENAME_EXCHANGE = -100, 1, 2  # of Linux
NO_FILE = ()  # the identity of what is not there


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else has. The name of the file is cut: with it whole, it could be too long."""
    return path.with_name(f".{path.name[:40]}.{machine()}.{secrets.token_hex(8)}.masktmp")


def replace_file(
    path: str | os.PathLike[str],
    write: Callable[[BinaryIO], Any],
    *,
    expected: tuple[int, ...] | None = None,
    keep_times: bool = False,
) -> None:
    """Calls `write(file)` on a temporary file in the same folder, brings it to the disk and puts it in place of `path`.

    A symbolic link stays, and the file that it points to is replaced. Owner, group, mode, ACL and extended attributes are
    those of the old file.

    Args:
        path: the file; its folder exists.
        write: gets the new file, empty.
        expected: the `identity` of the file that may be replaced; another one stays. `NO_FILE`: none may be there.
        keep_times: for a file that is edited and not made anew: the time of the last access stays, that of the last change
            moves on by two seconds only, so that dates keep their meaning and programs that compare length and time
            (rsync, backups) still see that it changed.

    Raises:
        UserError: naming the file, when it cannot be written, may not be replaced (read-only, a hard link, not the
            expected one), or cannot keep its owner; it says what is there now. The temporary file goes.
    """
    target = Path(os.path.realpath(path))
    old: os.stat_result | None = None
    new: os.stat_result | None = None
    try:
        old = _replaceable(path, target)
        with _temporary_file(target, 0o600 if old else 0o666) as (file, temporary):
            write(file)
            file.flush()
            if old is not None:
                _copy_attributes(target, old, temporary, file.fileno())
                if keep_times:
                    changed = min(old.st_mtime_ns + TWO_SECONDS, os.fstat(file.fileno()).st_mtime_ns)
                    with contextlib.suppress(OSError):  # no reason to give the contents up
                        os.utime(temporary, ns=(old.st_atime_ns, changed))
            os.fsync(file.fileno())
            new = os.fstat(file.fileno())
            if os.name == "nt":  # an open file cannot be moved there
                file.close()
            _move(temporary, target, expected, path)
        sync_folder(target.parent)
    except OSError as error:
        raise _not_written(path, target, old, new, str(error.strerror or error)) from error


def _move(temporary: Path, target: Path, expected: tuple[int, ...] | None, path: str | os.PathLike[str]) -> None:
    """Puts the temporary file in place of `target`, if that is the expected file, up to the last moment where Linux helps."""
    if expected is None:
        os.replace(temporary, target)
        return
    if expected == NO_FILE:
        if not _move_to_free_name(temporary, target):
            raise changed_meanwhile(path)
        return
    with open(target, "rb") as file:  # a network file system looks at the server when a file is opened
        if identity(os.fstat(file.fileno())) != expected:
            raise changed_meanwhile(path)
    if not _exchange(temporary, target):
        os.replace(temporary, target)
    elif identity(os.stat(temporary))[:-1] != expected[:-1]:  # to be moved has changed its last time
        if not _exchange(temporary, target):
            os.replace(temporary, target)
        raise changed_meanwhile(path)


def _move_to_free_name(temporary: Path, target: Path) -> bool:
    """Gives a file a name that nobody has, in one step where the file system can; False where somebody has it."""
    if _rename(temporary, target, RENAME_NOREPLACE):
        return True
    try:
        if os.name == "nt":
            os.rename(temporary, target)
        else:
            os.link(temporary, target)  # its old name is removed with all that is temporary
    except FileExistsError:
        return False
    except OSError:  # no second names there (FAT)
        if os.path.lexists(target):
            return False
        os.replace(temporary, target)
    return True


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two files in one step, so that none is lost whatever it is; False where the system or file system cannot."""
    return _rename(first, second, RENAME_EXCHANGE)


def _rename(first: Path, second: Path, flags: int) -> bool:
    """renameat2 of Linux; False where it is absent or refuses."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), flags) == 0


def changed_meanwhile(path: str | os.PathLike[str]) -> UserError:
    """The error line for a file that was not the same any more when it was to be written."""
    return UserError(f"{path} was written by another program meanwhile, and is left as it is: run this again")


def _not_written(
    path: str | os.PathLike[str], target: Path, old: os.stat_result | None, new: os.stat_result | None, reason: str
) -> UserError:
    """The error line after a failure, with what is there now as far as it can be seen."""
    now: os.stat_result | None = None
    with contextlib.suppress(OSError):
        now = os.stat(target)
    if now is not None and new is not None and os.path.samestat(now, new):
        return UserError(f"{path} is written, but the disk has not confirmed it ({reason}): a power cut could lose it")
    state = "another program has changed it"
    if now is None or old is None:
        state = "nothing was written"
    elif identity(now) == identity(old):
        state = "the old file is unchanged"
    return UserError(f"{path} cannot be written ({reason}): {state}")


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written: device, inode, length, times. The last one nobody can set back."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Refuses a file that `replace_file` would refuse: a hard link, a read-only file, no file.

    Raises:
        UserError: naming it.
    """
    _replaceable(path, Path(os.path.realpath(path)))


def _replaceable(path: str | os.PathLike[str], target: Path) -> os.stat_result | None:
    """The status of the file, None where there is none.

    Raises:
        UserError: for one that may not be replaced.
    """
    try:
        old = os.stat(target)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(old.st_mode):
        raise UserError(f"{path} is not a file: remove it or correct the path")
    if old.st_nlink > 1 and os.name != "nt":
        raise UserError(
            f"{path} is a hard link, one of {old.st_nlink} names of one file: the others would keep the old contents. "
            "Put a copy in its place"
        )
    if not old.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise UserError(f"{path} is read-only: change its permissions if it may be written")
    return old


@contextlib.contextmanager
def _temporary_file(target: Path, mode: int) -> Iterator[tuple[BinaryIO, Path]]:
    while True:
        temporary = temporary_name(target)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | NO_FOLLOW, mode)
        with os.fdopen(descriptor, "wb") as file:
            try:
                # Somebody who cleans up may have got in between.
                if try_lock(descriptor) is False or os.fstat(descriptor).st_nlink == 0:
                    continue
                yield file, temporary
                return
            finally:
                if os.name == "nt":
                    file.close()
                with contextlib.suppress(OSError):
                    os.unlink(temporary)


def _copy_attributes(source: Path, old: os.stat_result, target: Path, descriptor: int) -> None:
    """Gives a new file the owner, group, extended attributes, ACL and mode of an old one."""
    new = os.fstat(descriptor)
    if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
        try:
            os.chown(target, old.st_uid, old.st_gid)
        except OSError as error:
            raise OSError(
                error.errno, f"it belongs to user {old.st_uid}, group {old.st_gid}: run this as that user"
            ) from error
    if hasattr(os, "listxattr"):
        kept = _attributes(source)
        for name in _attributes(target).keys() - kept.keys():
            with contextlib.suppress(OSError):
                os.removexattr(target, name)
        for name, value in kept.items():
            try:
                os.setxattr(target, name, value)
            except OSError:
                # Labels of the system's security modules are the system's to set; all else is the user's.
                if not name.startswith(("security.", "trusted.")):
                    raise
    # Some file systems have one mode for all files, and refuse to set it.
    if os.fstat(descriptor).st_mode != old.st_mode:
        os.chmod(target, stat.S_IMODE(old.st_mode))


def _attributes(path: Path) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(path, name) for name in os.listxattr(path)}
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENODATA, errno.ENOSYS, errno.EINVAL):
            return {}
        raise


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Brings the names in a folder to the disk, where the system can do that: a power cut then keeps them."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Makes an empty folder beside `path` that is this process's alone, to be moved to `path` when it is complete.

    What is left of it when the block ends is removed; after a kill, `remove_leftovers` does that.

    Raises:
        OSError: when it cannot be made.
    """
    while True:
        building = temporary_name(path)
        os.mkdir(building)
        descriptor = None
        try:
            if os.name != "nt":
                descriptor = os.open(building, os.O_RDONLY | NO_FOLLOW)
                if try_lock(descriptor) is False or not building.exists():
                    continue
            yield building
            return
        finally:
            shutil.rmtree(building, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Deletes temporary files and folders directly in a folder that killed runs left. Returns how many.

    Only what is certainly dead goes: made under the kernel that runs here, and locked by nobody. The others stay: those of
    running processes, of other machines, and of this one before it was started anew.
    """
    removed = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = TEMPORARY.fullmatch(entry.name)
            if match and match["machine"] == machine():
                with contextlib.suppress(OSError):
                    removed += _remove_if_dead(entry)
    return removed


def remove_leftovers_below(folder: str | os.PathLike[str]) -> None:
    """Deletes what killed runs left in a folder and in all below it, as `remove_leftovers` does."""
    for place, folders, _ in os.walk(folder):
        remove_leftovers(place)
        folders[:] = [name for name in folders if not TEMPORARY.fullmatch(name)]


def _remove_if_dead(entry: os.DirEntry[str]) -> bool:
    is_folder = entry.is_dir(follow_symlinks=False)
    if not is_folder and not entry.is_file(follow_symlinks=False):
        return False
    if is_folder and os.name == "nt":
        return False
    # A network file system locks only what is open for writing.
    descriptor = os.open(entry.path, (os.O_RDONLY if is_folder else os.O_RDWR) | NO_FOLLOW)
    try:
        if not try_lock(descriptor):
            return False
        if is_folder:
            shutil.rmtree(entry.path, ignore_errors=True)
        elif os.name != "nt":
            os.unlink(entry.path)
    finally:
        os.close(descriptor)
    if os.name == "nt":
        os.unlink(entry.path)
    return True
