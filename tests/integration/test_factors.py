"""Factors for trainers that average later: the average is the masked loss, gradient included."""

import pytest
import torch

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.factors import check_config, unreduced_factors
from masked_loss_triton.integration.replace import replace

CONFIGS = [
    MaskedLossConfig(gamma=0.7, min_weight=0.05),
    MaskedLossConfig(per_sample=True, normalization="mean_one", floor="clamp", min_weight=0.1),
    MaskedLossConfig(normalization="mean", invert=True, resample="nearest"),
    MaskedLossConfig(prior_threshold=0.4, area_scale_beta=0.5, blur_kernel_size=3),
]


@pytest.mark.parametrize("shape", [(2, 16, 3, 6, 8), (2, 4, 6, 8)], ids=["video", "image"])
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("has_prior", [False, True])
def test_the_mean_is_the_masked_loss(has_prior, config, shape):
    pred, target, prior = torch.randn(shape, requires_grad=True), torch.randn(shape), torch.randn(shape)
    mask = torch.rand(2, 1, 48, 64) * torch.tensor([1.0, 0.2]).view(2, 1, 1, 1)
    w, v = unreduced_factors(pred, mask, config, has_prior=has_prior)
    got = ((pred - target) ** 2 * w).mean() + 0.7 * ((pred - prior) ** 2 * v).mean()
    options = {"prior": prior, "prior_weight": 0.7} if has_prior else {}
    want = masked_loss(pred, target, mask, config, **options)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=0)
    (one,), (other,) = torch.autograd.grad(got, pred), torch.autograd.grad(want, pred)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


def test_nothing_weighted_is_0_and_not_nan():
    losses = torch.rand(2, 4, 6, 8)
    empty, full = torch.zeros(2, 1, 6, 8), torch.ones(2, 1, 6, 8)
    assert unreduced_factors(losses, empty, MaskedLossConfig())[0].abs().max() == 0
    assert unreduced_factors(losses, full, MaskedLossConfig(per_sample=True), has_prior=True)[1].abs().max() == 0


def test_a_loss_type_that_would_do_nothing_is_refused():
    with pytest.raises(UserError, match="loss_type='huber' does nothing here: choose the loss in X's own config"):
        check_config(MaskedLossConfig(loss_type="huber"), "X")


def test_only_the_known_function_is_replaced():
    class Trainer:
        def loss(self, batch, extra):
            return 1

    with pytest.raises(
        UserError, match=r"Trainer.loss takes \(self, batch, extra\), not \(self, batch\): supported is X 1"
    ):
        replace(Trainer, "loss", ("self", "batch"), "X 1", lambda original: None)
    with pytest.raises(UserError, match=r"Trainer.gone does not exist.*supports X 1"):
        replace(Trainer, "gone", ("self",), "X 1", lambda original: None)
    originals = []
    for _ in range(2):  # a second time replaces the replacement, and never wraps it
        replace(
            Trainer, "loss", ("self", "batch", "extra"), "X", lambda original: originals.append(original) or (lambda: 2)
        )
    assert originals[0] is originals[1]
    assert Trainer.loss.__get__(None, Trainer)() == 2
