"""The loss of a routed step: its weights are made once, whatever makes them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.routing import Kept, RoutedWeights

SHAPE = (2, 1, 4, 6)  # of the weights
# A value of each field that changes the loss of the call below, and what it needs beside it.
CHANGED = {
    "resample": {"resample": "nearest"},
    "binarize": {"binarize": 0.3},
    "invert": {"invert": True},
    "blur_kernel_size": {"blur_kernel_size": 3},
    "gamma": {"gamma": 0.5},
    "min_weight": {"min_weight": 0.2},
    "floor": {"floor": "clamp", "min_weight": 0.4},
    "prior_threshold": {"prior_threshold": 0.4},
    "prior_weight": {"prior_weight": 2.0},
    "loss_type": {"loss_type": "huber"},
    "loss_delta": {"loss_type": "huber", "loss_delta": 0.3},
    "normalization": {"normalization": "mean"},
    "per_sample": {"per_sample": True},
    "eps": {"eps": 10.0},
}


def kept(positions: torch.Tensor) -> Kept:
    """These positions, one a token."""
    return Kept(torch.arange(int(positions[0].sum()))[None], positions, positions[0].numel(), torch.zeros(()))


def numbers(loss: torch.Tensor, stats, pred: torch.Tensor) -> torch.Tensor:
    """All that a call gives, in one tensor."""
    (gradient,) = torch.autograd.grad(loss, pred)
    return torch.cat([loss.detach()[None], torch.tensor(list(stats.to_dict().values())), gradient.flatten()])


@pytest.mark.parametrize("field", CHANGED)
def test_no_option_acts_twice(field):
    """Every field of a config, in a step that goes through the routed loss and drops nothing."""
    generator = torch.Generator().manual_seed(7)
    pred, target, prior = (torch.randn(2, 3, *SHAPE[1:], generator=generator) for _ in range(3))
    pred.requires_grad_()
    mask = torch.rand(2, 1, 8, 9, generator=generator)
    given = {"prior": prior, "return_stats": True}
    config = MaskedLossConfig(**CHANGED[field])
    wanted = numbers(*masked_loss(pred, target, mask, config, **given), pred)
    weights = RoutedWeights(mask, config, SHAPE, has_prior=True)
    weights.drop(kept(torch.ones(SHAPE, dtype=torch.bool)))
    torch.testing.assert_close(numbers(*weights.loss(pred, target, **given), pred), wanted, rtol=1e-5, atol=1e-6)
    default = dataclasses.replace(config, **{field: getattr(MaskedLossConfig(), field)})
    without = numbers(*masked_loss(pred, target, mask, default, **given), pred)
    assert not torch.allclose(wanted, without, rtol=1e-3), "the option changes nothing: the test has shown nothing"


def test_every_field_is_tried():
    fields = {field.name for field in dataclasses.fields(MaskedLossConfig)}
    assert set(CHANGED) == fields - {"area_scale_beta"}


def test_scaling_by_the_area_is_refused():
    weights = RoutedWeights(None, MaskedLossConfig(area_scale_beta=1.0), SHAPE)
    with pytest.raises(ValueError, match="area_scale_beta scales by the whole mask"):
        weights.drop(kept(torch.ones(SHAPE, dtype=torch.bool)))
