"""Which backend computes a call, where Triton is missing, too old, or there."""

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
    backend.why_no_kernels.cache_clear()
    backend._say_once.cache_clear()
    yield
    backend.why_no_kernels.cache_clear()


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
