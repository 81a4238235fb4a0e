"""A launch is planned once for each layout of its tensors, config and set of arguments; what changes it changes the plan."""

import pytest
import torch

pytest.importorskip("triton")

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.kernels.launch_loss import plan_loss
from masked_loss_triton.kernels.launch_weights import plan_weights
from masked_loss_triton.kernels.strides import ceil_div, next_power_of_2


@pytest.fixture(autouse=True)
def no_plans():
    plan_loss.cache_clear()
    plan_weights.cache_clear()


def plans():
    return plan_loss.cache_info().misses, plan_weights.cache_info().misses


def run(device, shape=(2, 3, 1, 4, 6), dtype=torch.float32, config=None, like=None, **call):
    pred, target = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    if like is not None:
        pred = like(pred)
    mask = torch.rand(shape[0], *shape[2:], device=device)
    masked_loss(pred.requires_grad_(), target, mask, config, backend="triton", **call).backward()


def test_a_second_call_plans_nothing(device):
    run(device)
    before = plans()
    run(device)
    run(device, config=MaskedLossConfig())
    assert plans() == before


@pytest.mark.parametrize(
    "changes",
    [
        dict(shape=(2, 3, 1, 4, 5)),
        dict(dtype=torch.bfloat16),
        dict(config=MaskedLossConfig(gamma=0.7)),
        dict(like=lambda x: x.to(memory_format=torch.channels_last_3d)),
        dict(weighting=torch.ones(2)),
        dict(return_stats=True),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_the_launch_changes_the_plan(device, changes):
    run(device)
    before = plans()
    changes = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in changes.items()}
    if changes.pop("return_stats", False):
        pred = torch.randn(2, 3, 1, 4, 6, device=device)
        masked_loss(pred, pred + 1, torch.rand(2, 1, 4, 6, device=device), backend="triton", return_stats=True)
    else:
        run(device, **changes)
    assert plans()[0] > before[0]


def test_integers_as_triton_rounds_them():
    import triton

    for number in (1, 2, 3, 127, 128, 129, 2**20 + 1):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        for divisor in (1, 3, 128):
            assert ceil_div(number, divisor) == triton.cdiv(number, divisor)
