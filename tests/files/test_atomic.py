"""A file is the old or the new one, and stays whose and what it was; leftovers go when they are certainly dead."""

from __future__ import annotations

import json
import os
import platform
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from masked_loss_triton.errors import UserError
from masked_loss_triton.files import atomic
from masked_loss_triton.files.atomic import remove_leftovers, replace_file, temporary_folder, temporary_name
from tests.files.support import namespaces

WRITER = """
import sys, time
from pathlib import Path
from masked_loss_triton.files.atomic import replace_file, temporary_folder
def wait(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
with temporary_folder(Path(sys.argv[1]) / "clip"):
    replace_file(Path(sys.argv[1]) / "x", wait)
"""


def new(file):
    file.write(b"new")


def test_leftovers_go_when_their_process_is_dead_and_not_before(tmp_path):
    (tmp_path / ".x.other-host-0123456789ab.0123456789abcdef.masktmp").write_bytes(b"of another machine")
    (tmp_path / ".x.77.masktmp").write_bytes(b"of an older version: nobody knows on which machine")
    foreign = sorted(os.listdir(tmp_path))
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert remove_leftovers(tmp_path) == 0
        assert len(os.listdir(tmp_path)) == 4
        os.kill(process.pid, signal.SIGKILL)
    assert remove_leftovers(tmp_path) == 2
    assert sorted(os.listdir(tmp_path)) == foreign
    assert remove_leftovers(tmp_path / "absent") == 0


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """Also where both have one process number: in two containers, or on two machines."""
    path = tmp_path / "x"

    def outer(file):
        file.write(b"outer")
        replace_file(path, new)
        assert path.read_bytes() == b"new"

    replace_file(path, outer)
    assert path.read_bytes() == b"outer"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("swap", [True, False])
def test_only_the_expected_file_is_replaced(tmp_path, monkeypatch, swap):
    """Where the file system can swap two files, and where it cannot."""
    if not swap:
        monkeypatch.setattr(atomic, "_exchange", lambda first, second: False)
    path = tmp_path / "x"
    path.write_bytes(b"old")
    old = atomic.identity(os.stat(path))

    def write(file):
        file.write(b"ours")
        path.with_name("other").write_bytes(b"theirs")
        os.replace(path.with_name("other"), path)

    with pytest.raises(UserError, match="x was written by another program meanwhile"):
        replace_file(path, write, expected=old)
    assert path.read_bytes() == b"theirs"
    replace_file(path, new, expected=atomic.identity(os.stat(path)))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x"]


def test_a_temporary_name_that_is_taken_is_not_written_to(tmp_path, monkeypatch):
    taken = temporary_name(tmp_path / "x")
    monkeypatch.setattr(atomic, "temporary_name", lambda path: taken)
    (tmp_path / "elsewhere").write_bytes(b"precious")
    taken.symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"x cannot be written \(File exists\): nothing was written"):
        replace_file(tmp_path / "x", new)
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"
    assert taken.is_symlink()


def test_mode_owner_and_attributes_stay(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    if os.getuid() == 0:
        os.chown(path, 1234, 4321)
    os.chmod(path, 0o640)
    names = []
    if hasattr(os, "setxattr"):
        try:
            os.setxattr(path, "user.tag", b"mine")
            names = ["user.tag"]
            # user::rw- user:1235:r-- group::--- mask::r-- other::---
            entries = [(1, 6, 2**32 - 1), (2, 4, 1235), (4, 0, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1)]
            acl = (2).to_bytes(4, "little")
            acl += b"".join(
                t.to_bytes(2, "little") + p.to_bytes(2, "little") + i.to_bytes(4, "little") for t, p, i in entries
            )
            os.setxattr(path, "system.posix_acl_access", acl)
            names.append("system.posix_acl_access")
        except OSError:
            pass  # not on this file system
    before, attributes = os.stat(path), {name: os.getxattr(path, name) for name in names}
    replace_file(path, new)
    after = os.stat(path)
    assert path.read_bytes() == b"new"
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert {name: os.getxattr(path, name) for name in names} == attributes
    assert after.st_mtime_ns > before.st_mtime_ns
    old = before.st_mtime_ns - 10**15
    os.utime(path, ns=(old - 7, old))
    replace_file(path, new, keep_times=True)
    assert os.stat(path).st_mtime_ns == old + 2 * 10**9
    assert os.stat(path).st_atime_ns == old - 7


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="needs root, to become another user")
def test_who_cannot_keep_the_owner_is_told():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to others
        os.chmod(folder, 0o777)
        path = Path(folder) / "x"
        path.write_bytes(b"old")
        os.chown(path, 1234, 4321)
        os.chmod(path, 0o666)
        code = f"""
import fcntl, os
from masked_loss_triton.files.atomic import replace_file
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    replace_file({str(path)!r}, lambda file: file.write(b"new"))
except Exception as error:
    print(type(error).__name__, error)
"""
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.startswith(
            f"UserError {path} cannot be written (it belongs to user 1234, group 4321: run this as that"
        )
        assert said.endswith("the old file is unchanged\n")
        assert path.read_bytes() == b"old"
        assert os.listdir(folder) == ["x"]


def test_a_hard_link_and_a_read_only_file_are_said_and_stay(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    os.link(path, tmp_path / "y")
    with pytest.raises(UserError, match="x is a hard link, one of 2 names"):
        replace_file(path, new)
    os.unlink(tmp_path / "y")
    os.chmod(path, 0o444)
    with pytest.raises(UserError, match="x is read-only"):
        replace_file(path, new)
    assert path.read_bytes() == b"old"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o444
    with pytest.raises(UserError, match="is not a file"):
        replace_file(tmp_path, new)
    assert os.listdir(tmp_path) == ["x"]


def test_the_longest_names_that_a_file_may_have(tmp_path):
    for name in ("x" * 255, "長" * 85):
        replace_file(tmp_path / name, new)
        assert (tmp_path / name).read_bytes() == b"new"
    with pytest.raises(UserError, match="File name too long"):
        replace_file(tmp_path / ("x" * 256), new)


def test_a_failing_writer_leaves_nothing(tmp_path):
    def write(file):
        file.write(b"half")
        raise ZeroDivisionError

    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError):
        replace_file(tmp_path / "x", write)
    with temporary_folder(tmp_path / "clip") as building:
        (building / "0.png").write_bytes(b"half")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"
    with pytest.raises(UserError, match=r"cannot be written \(No such file or directory\): nothing was written"):
        replace_file(tmp_path / "no" / "x", write)


UNCHANGED, CONFIRMED = "the old file is unchanged", "is written, but the disk has not confirmed it"
# (call, from which function on, errno): what the writer says, and which file is there. All others: UNCHANGED, the old one.
REFUSED = {
    ("flock", None, "ENOLCK"): ("done", "new"),
    ("fstat", None, "EIO"): ("nothing was written", "old"),
    ("listxattr", None, "ENOTSUP"): ("done", "new"),
    ("utimensat", None, "EPERM"): ("done", "new"),
    ("renameat2", None, "EINVAL"): ("done", "new"),
    ("unlink", None, "EIO"): ("done", "new"),
    ("open", "sync_folder", "EMFILE"): (CONFIRMED, "new"),
    ("fsync", "sync_folder", "EIO"): (CONFIRMED, "new"),
    ("fsync", "sync_folder", "EINVAL"): ("done", "new"),
    ("close", "sync_folder", "EIO"): (CONFIRMED, "new"),
}


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="needs the kernel's seccomp"
)
def test_every_system_call_of_a_write_may_fail_or_be_the_last_one(tmp_path):
    """The old or the new file, whole, and words that are true; after a kill the next run clears up."""
    command = [sys.executable, "-m", "tests.files.refused_calls", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if "seccomp" in result.stderr:
        pytest.skip("the kernel or a container forbids seccomp")
    assert result.returncode == 0, result.stderr
    killed = 0
    for call, since, code, said, contents, left, after, known in map(json.loads, result.stdout.splitlines()):
        case = (call, since, code, said)
        assert contents in ("old", "new"), case
        assert after == 0, case
        if code is None:
            killed += said is None
            continue
        assert left == (call == "unlink"), case
        expected, file = REFUSED.get((call, since, code), (UNCHANGED, "old"))
        if call in ("getxattr", "setxattr", "chown") and call.replace("get", "set") not in known:
            expected, file = "done", "new"  # there was nothing to keep
        assert expected in said, case
        assert contents == file, case
    assert killed >= 14


def test_a_full_disk(tmp_path):
    """A file system of 64 KiB, in a namespace of its own where the machine allows that."""
    code = """
import os, subprocess, sys
from masked_loss_triton.files.atomic import replace_file
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", sys.argv[1]], check=True)
os.chdir(sys.argv[1])
replace_file("x", lambda file: file.write(b"o" * 40000))
for size in (40000, 30000, 20000):
    try:
        replace_file("x", lambda file: file.write(b"n" * size))
        print("done", end=" ")
    except Exception as error:
        print(type(error).__name__, error)
    print(len(os.listdir()), open("x").read(1), os.stat("x").st_size)
"""
    command = namespaces("--mount")
    if command is None:
        pytest.skip("this machine gives no namespaces")
    result = subprocess.run(
        [*command, sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    full = "UserError x cannot be written (No space left on device): the old file is unchanged"
    assert result.stdout.splitlines() == [full, "1 o 40000", full, "1 o 40000", "done 1 n 20000"]
