"""Rewrites a file while the kernel refuses one kind of system call, or kills the process at it: real failures, by seccomp.

    python -m tests.files.refused_calls FOLDER

prints, for every call and moment, a JSON line: what was refused, what the writer said, whether the file is the old one or
the new one, and how many temporary files are left before and after they are cleaned up.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import platform
import struct
import sys
from pathlib import Path

from masked_loss_triton.errors import UserError
from masked_loss_triton.files import atomic

# The numbers of the calls on x86-64 and on 64-bit ARM; some exist on one of them only.
NUMBERS = {
    "open": (2, None), "openat": (257, 56), "flock": (73, 32), "fstat": (5, 80), "newfstatat": (262, 79), "statx": (332, 291),
    "write": (1, 64), "chown": (92, None), "fchownat": (260, 54), "listxattr": (194, 11), "getxattr": (191, 8),
    "setxattr": (188, 5), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "utimensat": (280, 88),
    "fsync": (74, 82), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "unlink": (87, None),
    "unlinkat": (263, 35), "close": (3, 57),
}  # fmt: skip
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000, 0x80000000
SEAL, SECCOMP, FILTER = 38, 22, 2  # of prctl
MOVE = ("rename", "renameat", "renameat2")
REMOVE = ("unlink", "unlinkat")
# The calls that fail together, from which function of the writer on (None: from the beginning), and how.
CASES = [
    (("open", "openat"), None, errno.EACCES),
    (("open", "openat"), None, errno.ENOSPC),
    (("flock",), None, errno.ENOLCK),
    (("fstat", "newfstatat", "statx"), None, errno.EIO),
    (("write",), None, errno.ENOSPC),
    (("write",), None, errno.EIO),
    (("write",), None, errno.EDQUOT),
    (("chown", "fchownat"), None, errno.EPERM),
    (("listxattr",), None, errno.EIO),
    (("listxattr",), None, errno.ENOTSUP),
    (("getxattr",), None, errno.EIO),
    (("setxattr",), None, errno.ENOSPC),
    (("chmod", "fchmod", "fchmodat"), None, errno.EPERM),
    (("utimensat",), None, errno.EPERM),
    (("fsync",), None, errno.EIO),
    (("fsync",), None, errno.ENOSPC),
    (("renameat2",), None, errno.EINVAL),
    (MOVE, None, errno.EIO),
    (MOVE, None, errno.EROFS),
    (REMOVE, None, errno.EIO),
    (("open", "openat"), "sync_folder", errno.EMFILE),
    (("fsync",), "sync_folder", errno.EIO),
    (("fsync",), "sync_folder", errno.EINVAL),
    (("close",), "sync_folder", errno.EIO),
]


def refuse(names: tuple[str, ...], answer: int) -> None:
    """From now on these calls of this process are not carried out: `answer` is REFUSE | errno, or KILL."""
    column = ("x86_64", "aarch64").index(platform.machine())
    numbers = [number for name in names if (number := NUMBERS[name][column]) is not None]
    steps = [(0x20, 0, 0, 0)]  # load the number of the call
    steps += [(0x15, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]  # jump when it is equal
    steps += [(0x06, 0, 0, ALLOW), (0x06, 0, 0, answer)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(SEAL, 1, 0, 0, 0) or libc.prctl(SECCOMP, FILTER, ctypes.c_void_p(ctypes.addressof(program)), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def attempt(path: Path, names: tuple[str, ...], since: str | None, answer: int) -> str | None:
    """What a writer in a child process said: "done", an error, or None where it was killed."""
    said = mmap.mmap(-1, 4096)  # shared with the child, and read without a system call
    child = os.fork()
    if child == 0:
        text = "done"
        try:
            function = getattr(atomic, since) if since else None

            def then(*args: object) -> object:
                refuse(names, answer)
                assert function is not None
                return function(*args)

            if since:
                setattr(atomic, since, then)
            else:
                refuse(names, answer)
            old = atomic.identity(os.stat(path)) if "newfstatat" not in names else None
            atomic.replace_file(path, lambda file: file.write(b"new" * 5000), expected=old, keep_times=True)
        except UserError as error:
            text = str(error)
        except BaseException as error:
            text = f"BUG {error!r}"
        said[: len(text.encode())] = text.encode()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return None if os.WIFSIGNALED(status) else said[:].rstrip(b"\0").decode()


def prepare(folder: Path) -> tuple[Path, list[str]]:
    """A file that has an owner, a mode and an attribute to keep, and which of these this machine knows."""
    path = folder / "x"
    path.unlink(missing_ok=True)
    path.write_bytes(b"old" * 5000)
    known = []
    try:
        os.setxattr(path, "user.tag", b"mine")
        known.append("setxattr")
    except OSError:
        pass
    if os.getuid() == 0:
        os.chown(path, 1234, 1234)
        known.append("chown")
    return path, known


def main(folder: Path) -> None:
    cases = [(names, since, REFUSE | code) for names, since, code in CASES]
    cases += [(names, since, KILL) for names, since in dict.fromkeys((names, since) for names, since, _ in CASES)]
    for names, since, answer in cases:
        path, known = prepare(folder)
        said = attempt(path, names, since, answer)
        left = len(os.listdir(folder)) - 1
        atomic.remove_leftovers(folder)
        contents = {b"old" * 5000: "old", b"new" * 5000: "new"}.get(path.read_bytes(), "half")
        code = None if answer == KILL else errno.errorcode[answer & 0xFFFF]
        after = len(os.listdir(folder)) - 1
        print(json.dumps([names[0], since, code, said, contents, left, after, known]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
