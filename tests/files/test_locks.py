"""A folder has one writer at a time, whoever dies, on this file system or on one without locks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from masked_loss_triton.errors import UserError
from masked_loss_triton.files import locks
from masked_loss_triton.files.locks import LOCK_NAME, folder_lock
from tests.files.support import namespaces

HOLD = """
import sys, time
from masked_loss_triton.files import locks
{patch}
with locks.folder_lock(sys.argv[1], "first"):
    print("held", flush=True)
    time.sleep(60)
"""
WITHOUT_LOCKS = "locks.try_lock = lambda descriptor: None"


@pytest.fixture(params=["locks", "no locks"])
def patch(request, monkeypatch):
    """As on a file system without locks: what a real one answers there is None as well."""
    if request.param == "locks":
        return ""
    if os.name == "nt" or not os.path.exists("/proc/self/ns/pid"):
        pytest.skip("dead processes are not known for certain here")
    monkeypatch.setattr(locks, "try_lock", lambda descriptor: None)
    return WITHOUT_LOCKS


def hold(folder, patch, *before):
    process = subprocess.Popen(
        [*before, sys.executable, "-c", HOLD.format(patch=patch), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_waits_and_says_for_whom_and_a_kill_frees_it(tmp_path, patch):
    said = []
    with hold(tmp_path, patch) as process:
        started = time.monotonic()
        held_by = pytest.raises(UserError, match=rf"in use by first \(process {process.pid} on .*, since 20")
        with held_by, folder_lock(tmp_path, "second", longest_wait=0.3, say=said.append):
            pytest.fail("two have the lock")
        assert time.monotonic() - started >= 0.3
        assert len(said) == 1
        assert said[0].startswith("second: waits for first (process ")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert os.listdir(tmp_path), "the dead one has left its file"
        with (
            folder_lock(tmp_path, "second", longest_wait=5, say=said.append),
            pytest.raises(UserError, match="in use by second"),
            folder_lock(tmp_path, "third", longest_wait=0),
        ):
            pytest.fail("two have the lock")
    assert len(said) <= 2
    assert os.listdir(tmp_path) == []


def test_waiting_ends_when_the_other_has_done(tmp_path, patch):
    """Four processes count in one file: with two inside at a time, a number would be lost."""
    code = f"""
import pathlib, sys
from masked_loss_triton.files import locks
{patch}
count = pathlib.Path(sys.argv[1]) / "count"
for _ in range(10):
    with locks.folder_lock(sys.argv[1], "count", say=lambda line: None):
        count.write_text(str(int(count.read_text()) + 1))
"""
    (tmp_path / "count").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert (tmp_path / "count").read_text() == "40"
    assert os.listdir(tmp_path) == ["count"]


def test_several_folders_by_any_name_are_locked_once(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("a")
    with folder_lock([tmp_path / "b", tmp_path / "a", tmp_path / "link", tmp_path / "absent"], "cache"):
        assert sorted(os.listdir(tmp_path)) == ["a", "b", "link"]
        assert [os.listdir(tmp_path / name) for name in "ab"] == [[LOCK_NAME]] * 2
        with pytest.raises(UserError, match="in use by cache"), folder_lock(tmp_path / "link", "x", longest_wait=0):
            pytest.fail("two have the lock")
    assert not list(tmp_path.glob(f"*/{LOCK_NAME}"))


CONTAINER = namespaces("--pid", "--fork", "--mount-proc")


@pytest.mark.skipif(CONTAINER is None, reason="this machine gives no process number namespaces")
def test_two_namespaces_of_process_numbers_share_the_lock(tmp_path, patch):
    with hold(tmp_path, patch, *CONTAINER) as process:
        try:
            with pytest.raises(UserError, match="in use by first"), folder_lock(tmp_path, "x", longest_wait=0.3):
                pytest.fail("two have the lock")
        finally:
            # The process inside dies with the first one of its namespace, which is the child of `unshare`.
            children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
            os.kill(int(children.stdout), signal.SIGKILL)
    if patch:
        with pytest.raises(UserError, match="if it is dead, delete"), folder_lock(tmp_path, "x", longest_wait=0.3):
            pytest.fail("nothing here can know that it is dead")
    else:
        with folder_lock(tmp_path, "x", longest_wait=5):
            pass


PARTY = """
import sys
from masked_loss_triton.files import locks
{patch}
with locks.folder_lock(sys.argv[1], sys.argv[2], party=sys.argv[3], longest_wait=20):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_party_is_inside_together_and_keeps_all_others_out(tmp_path):
    def member(name, party):
        code = [sys.executable, "-c", PARTY.format(patch=""), str(tmp_path), name, party]
        process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    def is_free(party=""):
        try:
            with folder_lock(tmp_path, "x", party=party, longest_wait=0.2, say=lambda line: None):
                return True
        except UserError:
            return False

    first, second = member("first", "a"), member("second", "a")
    assert not is_free()
    assert not is_free("b")
    assert is_free("a")
    # Neither the first's end nor a kill lets others in while one is there.
    first.communicate("\n")
    assert not is_free()
    assert is_free("a")
    third = member("third", "a")
    second.kill()
    second.communicate()
    assert not is_free("b")
    third.communicate("\n")
    assert os.listdir(tmp_path) == []
    assert is_free()
