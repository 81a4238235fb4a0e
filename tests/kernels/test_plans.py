"""A launch is planned once for each layout of its tensors, config and set of arguments; what changes it changes the plan."""

import pytest
import torch

pytest.importorskip("triton")

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.backend.layout import ceil_div, next_power_of_2
from masked_loss_triton.kernels.loss import plan_loss
from masked_loss_triton.kernels.weights import plan_weights


@pytest.fixture(autouse=True)
def no_plans():
    plan_loss.cache_clear()
    plan_weights.cache_clear()


def plans():
    return plan_loss.cache_info().misses, plan_weights.cache_info().misses


def run(device, shape=(2, 4, 3, 2, 6), dtype=torch.float32, mask=None, like=None, grad=True, upstream=1.0, **call):
    """One call on the kernels, held against the reference."""
    pred, target = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    mask = torch.rand(shape[0], *shape[2:], device=device) if mask is None else mask
    results = []
    for backend in ("triton", "reference"):
        leaf = (pred if like is None else like(pred)).detach().requires_grad_(grad)
        result = masked_loss(leaf, target, mask, backend=backend, **call)
        loss = result[0] if call.get("return_stats") else result
        gradient = torch.autograd.grad(loss * upstream, leaf) if grad else ()
        results.append(
            [loss.detach(), *(result[1] if call.get("return_stats") else ()), *(x.float() for x in gradient)]
        )
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)


def test_a_second_call_plans_nothing(device):
    run(device)
    before = plans()
    run(device)
    run(device, config=MaskedLossConfig())
    assert plans() == before


ONE_FRAME = torch.rand(2, 1, 2, 6)
LOSS, BOTH = (1, 0), (1, 1)


@pytest.mark.parametrize(
    ("changes", "planned"),
    [
        (dict(shape=(2, 4, 3, 2, 5)), BOTH),
        (dict(dtype=torch.bfloat16), LOSS),
        (dict(dtype=torch.float16), LOSS),
        (dict(like=lambda x: x.to(memory_format=torch.channels_last_3d)), LOSS),
        (dict(config=MaskedLossConfig(gamma=0.7)), BOTH),
        (dict(config=MaskedLossConfig(blur_kernel_size=3)), BOTH),
        (dict(mask=ONE_FRAME), BOTH),
        (dict(mask=torch.rand(2, 3, 16, 48)), BOTH),
        (dict(mask=torch.rand(1, 3, 2, 6)), BOTH),
        (dict(mask=(torch.rand(2, 3, 2, 6) * 255).to(torch.uint8)), BOTH),
        (dict(mask=torch.rand(2, 3, 6, 2).transpose(2, 3)), BOTH),
        (dict(prior=torch.randn(2, 4, 3, 2, 6)), BOTH),
        (dict(prior=torch.randn(2, 4, 3, 2, 6), prior_gate=torch.rand(2)), BOTH),
        (dict(mask_gate=torch.tensor([True, False])), (0, 0)),
        (dict(weighting=torch.ones(2)), (0, 0)),
        (dict(return_stats=True), (0, 1)),
        (dict(grad=False), LOSS),
        (dict(upstream=3.0), (0, 0)),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_changes_a_launch_changes_its_plan(device, changes, planned):
    """After its neighbour has filled the cache. Wrong where a plan is taken for another's: the result is compared."""
    run(device)
    before = plans()
    run(device, **{name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in changes.items()})
    assert tuple(after - was for after, was in zip(plans(), before, strict=True)) == planned


def test_integers_as_triton_rounds_them():
    import triton

    for number in (1, 2, 3, 127, 128, 129, 2**20 + 1):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        for divisor in (1, 3, 128):
            assert ceil_div(number, divisor) == triton.cdiv(number, divisor)
