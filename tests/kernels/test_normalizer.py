"""A denominator that the caller gives is read by the loss kernel itself: no launch more, and no number passes through the host."""

import pytest
import torch

pytest.importorskip("triton")

from masked_loss_triton import MaskedLossConfig, masked_loss
from tests.support.replayed import KERNELS

KINDS = {
    "number": float,
    "float64": lambda value: torch.tensor(float(value), dtype=torch.float64),
    "int64": torch.tensor,
}
CONFIGS = [(norm, per_sample) for norm in ("weighted_mean", "mean", "mean_one") for per_sample in (False, True)]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are started."""
    names = []

    class Counted:
        def __init__(self, kernel):
            self.kernel, self.__name__ = kernel, kernel.__name__

        def __getitem__(self, grid):
            names.append(self.__name__)
            return self.kernel[grid]

    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, Counted(getattr(module, name)))
    return names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("normalization", "per_sample"), CONFIGS)
@pytest.mark.parametrize("with_prior", [False, True])
def test_three_launches_and_the_numbers_of_the_reference(device, launched, kind, normalization, per_sample, with_prior):
    pred, target, prior = (torch.randn(2, 4, 1, 5, 6, device=device) for _ in range(3))
    mask = torch.rand(2, 1, 5, 6, device=device)
    config = MaskedLossConfig(normalization=normalization, per_sample=per_sample)
    given = tuple(KINDS[kind](value) for value in (7, 11))
    given = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in given)
    normalizer = given if with_prior and not per_sample and normalization != "mean" else given[0]
    call = dict(prior=prior if with_prior else None, normalizer=normalizer)
    leaf = pred.requires_grad_()
    want = masked_loss(leaf, target, mask, config, **call, backend="reference")
    (gradient,) = torch.autograd.grad(want, leaf)
    got = masked_loss(leaf, target, mask, config, **call, backend="triton")
    (first,) = torch.autograd.grad(got, leaf, retain_graph=True)
    assert launched == ["weights_kernel", "loss_kernel", "loss_kernel"]
    (again,) = torch.autograd.grad(got * 2, leaf)  # computed anew
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0, check_dtype=False)
    torch.testing.assert_close(first, gradient, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(again, 2 * gradient, rtol=1e-5, atol=1e-7)


def test_a_denominator_that_has_changed_since_is_refused(device):
    pred = torch.randn(1, 4, 1, 5, 6, device=device, requires_grad=True)
    given = torch.tensor(7.0, device=device)
    loss = masked_loss(
        pred, torch.zeros(1, 4, 1, 5, 6, device=device), None, MaskedLossConfig(), normalizer=given, backend="triton"
    )
    given += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
