"""Which backend computes a call, where Triton is missing, too old, cannot start, or there."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from masked_loss_triton import backend

triton = pytest.importorskip("triton")


@pytest.fixture
def on_a_gpu():
    with FakeTensorMode():  # a tensor that says it is on a GPU, on a machine without one
        return torch.empty(2, device="cuda")


@pytest.fixture(autouse=True)
def _nothing_remembered():
    backend._why_no_kernels.cache_clear()
    backend._say_once.cache_clear()
    yield
    backend._why_no_kernels.cache_clear()


@pytest.mark.parametrize("version", ["3.4.0", "3.10.1", "4.0.0+git1234"])
def test_auto_takes_the_kernels_from_triton_3_4_on(monkeypatch, on_a_gpu, version):
    monkeypatch.setattr(triton, "__version__", version)
    assert backend.choose("auto", on_a_gpu) == backend.choose("triton", on_a_gpu) == "triton"
    assert backend.choose("auto", torch.empty(2)) == "torch"


def test_auto_says_once_that_triton_is_too_old(monkeypatch, on_a_gpu):
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    with pytest.warns(UserWarning, match=r"torch backend.*triton 3\.4 or newer, and 3\.2\.0 is installed") as said:
        assert [backend.choose("auto", on_a_gpu) for _ in range(3)] == ["torch"] * 3
    assert len(said) == 1
    with pytest.raises(ValueError, match=r"3\.2\.0 is installed; use backend='torch'"):
        backend.choose("triton", on_a_gpu)


NO_COMPILER = """
import os, warnings
import torch
from bench.lab import null_driver

choose = null_driver.backend.choose
null_driver.install(start=False)
torch.cuda.is_available = lambda: True
os.environ["PATH"] = os.environ.pop("CC", "")  # neither names a compiler now
from torch._subclasses.fake_tensor import FakeTensorMode

with FakeTensorMode(), warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    on_a_gpu = torch.empty(2, device="cuda")
    print([choose("auto", on_a_gpu) for _ in range(3)])
    print([str(one.message) for one in said])
    try:
        choose("triton", on_a_gpu)
    except ValueError as error:
        print(error)
"""


@pytest.mark.skipif(
    torch.cuda.is_available() or shutil.which("cc") is None, reason="for a machine without a GPU and with a C compiler"
)
def test_without_a_c_compiler_auto_takes_torch_and_says_so_once(tmp_path):
    """Triton's own driver, made in a process that finds no compiler and has nothing cached."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CC")}
    found = subprocess.run(
        [sys.executable, "-W", "ignore:CUDA initialization", "-c", NO_COMPILER],
        env={**kept, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    chosen, said, refused = found.stdout.splitlines()
    assert chosen == str(["torch"] * 3)
    assert said.count("masked_loss takes the slower torch backend") == 1
    assert "cannot start here (Failed to find C compiler" in said
    assert refused.endswith("use backend='torch'")
