"""Jobs to outcomes on a real Ray: each job has one outcome, whatever dies."""

from __future__ import annotations

import builtins
import contextlib
import functools
import os
import pickle
import time

import pytest

from masked_loss_triton import __version__
from masked_loss_triton.errors import UserError
from masked_loss_triton.files import ray_engine
from masked_loss_triton.files.ray_engine import RETRIES, run_ray
from tests.farm.jobs import lost, make

JOBS = list(range(20))


@pytest.fixture(scope="module")
def _ray():
    """One Ray for the tests of this module; each has its own actors."""
    ray = pytest.importorskip("ray")
    ray_engine._start(ray_engine._import(False), "local", 2, False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
class TestOnRay:
    def run(self, how, folder, jobs=JOBS, **options):
        return list(run_ray(functools.partial(make, how, folder), jobs, lost, workers=2, **options))

    def test_every_job_has_one_outcome_and_a_worker_is_made_once_an_actor(self, tmp_path):
        assert sorted(self.run("well", tmp_path)) == [(job, "done") for job in JOBS]
        assert len(list(tmp_path.glob("made-*"))) == 2

    def test_a_killed_actor_costs_only_time(self, tmp_path):
        assert sorted(self.run("once", tmp_path)) == [(job, "done") for job in JOBS]
        assert (tmp_path / "tries").stat().st_size == 2

    def test_a_job_that_kills_every_actor_is_one_outcome_and_the_rest_is_done(self, tmp_path):
        outcomes = dict(self.run("always", tmp_path, JOBS[6:9]))
        assert "6 times" in outcomes.pop(7)
        assert outcomes == {6: "done", 8: "done"}
        assert (tmp_path / "tries").stat().st_size == 2 * (RETRIES + 1) == 6

    def test_what_a_worker_raises_is_raised_here_with_its_traceback(self, tmp_path):
        with pytest.raises(ValueError, match="seven") as caught:
            self.run("raises", tmp_path)
        assert "in _work" in str(caught.value.__cause__)

    def test_a_worker_that_cannot_be_made_is_one_error(self, tmp_path):
        with pytest.raises(UserError, match="weights are absent") as caught:
            self.run("absent", tmp_path)
        assert caught.value.exit_status == 2

    def test_more_than_there_is_is_refused_instead_of_waited_for(self, tmp_path):
        with pytest.raises(UserError, match="lower --num_gpus"):
            self.run("well", tmp_path, num_gpus=1000)


@pytest.mark.parametrize(
    ("address", "said"), [("ray://there:10001", "ray job submit"), ("127.0.0.1:1", "no Ray answers"), ("a:b", "no Ray")]
)
def test_an_address_that_cannot_work_is_refused_at_once(tmp_path, address, said):
    with pytest.raises(UserError, match=said) as caught:
        list(run_ray(functools.partial(make, "well", tmp_path), JOBS, lost, address=address))
    assert caught.value.exit_status == 2


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    real = builtins.__import__

    def absent(name, *rest):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"\[ray\]") as caught:
        list(run_ray(functools.partial(make, "well", tmp_path), JOBS, lost))
    assert caught.value.exit_status == 2
    assert os.listdir(tmp_path) == []


def note(path, word):
    with open(path, "a") as file:
        file.write(word)


@contextlib.contextmanager
def noted_guard(path, job):
    note(path, "(")
    yield
    note(path, ")")


def noted_worker(path):
    return functools.partial(note, path)


def an_actor(path):
    functions = functools.partial(noted_worker, path), functools.partial(noted_guard, path)
    return ray_engine.Actor(pickle.dumps(functions), os.getcwd(), __version__)


def test_a_worker_works_only_inside_its_guard(tmp_path):
    actor = an_actor(tmp_path / "log")
    for job in "ab":
        assert actor._answer(pickle.dumps(job))[0] == "outcome"
    assert (tmp_path / "log").read_text() == "(a)(b)"


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_a_worker_whose_ray_is_dead_begins_nothing(tmp_path):
    """It may be waiting for the lock, or for its next job, when the command and its Ray are killed."""
    log = tmp_path / "log"
    raylet = os.fork()
    if raylet == 0:
        if os.fork() == 0:
            actor = an_actor(log)
            (tmp_path / "ready").touch()
            parent = os.getppid()
            while os.getppid() == parent:
                time.sleep(0.005)
            note(log, "orphan ")
            actor._answer(pickle.dumps("a"))
            note(log, "worked")
            os._exit(0)
        while not (tmp_path / "ready").exists():
            time.sleep(0.005)
        os._exit(0)
    os.waitpid(raylet, 0)
    deadline = time.monotonic() + 20
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert log.read_text() == "orphan "
