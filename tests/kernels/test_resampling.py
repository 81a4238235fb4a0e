"""The ways that the kernels read a mask, held against the reference: whole windows, one frame for many, blur, steps in memory."""

import pytest
import torch

pytest.importorskip("triton")

from masked_loss_triton import MaskedLossConfig, mask_weights, masked_loss
from masked_loss_triton.backend.layout import Layout
from masked_loss_triton.kernels.weights import plan_weights


def masks(shape, dtype, device):
    values = torch.rand(shape, device=device)
    return (values * 255).round().to(torch.uint8) if dtype == torch.uint8 else values.to(dtype)


def compare(mask, grid, config, *, batch=2, channels=3, **call):
    pred, target = (torch.randn(batch, channels, *grid, device=mask.device) for _ in range(2))
    results = []
    for backend in ("triton", "reference"):
        leaf = pred.clone().requires_grad_()
        loss, stats = masked_loss(leaf, target, mask, config, backend=backend, return_stats=True, **call)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0], *stats))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=3e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("down", "across"), [(1, 2), (8, 8), (16, 16), (3, 4), (17, 2), (8, 5)])
@pytest.mark.parametrize("mask_frames", [1, 5])
def test_masks_larger_than_the_loss(device, dtype, down, across, mask_frames):
    """Whole windows of widths that are read row by row, and of others; a frame for two, and two of five averaged."""
    # The interpreter reads window by window.
    batch, height, width = (1, 2, 3) if down * across > 100 else (2, 5, 6)
    mask = masks((batch, mask_frames, height * down, width * across), dtype, device)
    compare(mask, (2, height, width), MaskedLossConfig(gamma=0.7, per_sample=True), batch=batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("mask_frames", [1, 2])
def test_larger_masks_under_a_blur(device, dtype, mask_frames):
    mask = masks((2, mask_frames, 5 * 8, 6 * 8), dtype, device)
    compare(mask, (2, 5, 6), MaskedLossConfig(blur_kernel_size=3, invert=True, binarize=0.4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_windows_of_masks_that_are_views(device, dtype):
    """Cut out of a larger mask, a step between frames and between columns, one mask for the batch, turned."""
    whole = masks((2, 4, 60, 140), dtype, device)
    grid, config = (2, 6, 8), MaskedLossConfig()
    compare(whole[:, ::2, 5:53, 3:67], grid, config)
    compare(whole[:1, :1, 5:53, 3:67], grid, config)
    compare(whole[:, :1, 5:53, 3:131:2], grid, config)
    compare(whole.transpose(2, 3)[:, :1, 3:67, 5:53], (2, 8, 6), config)


@pytest.mark.parametrize("blur", [0, 5])
@pytest.mark.parametrize("size", [(26, 38), (5, 7), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_frame_for_many(device, size, blur, dtype):
    """Its weights are made once, and every frame of the loss reads them."""
    height, width = size
    mask = masks((2, 1, height, width), torch.float32, device)
    config = MaskedLossConfig(blur_kernel_size=blur, area_scale_beta=0.5)
    compare(mask, (3, height, width), config, prior=torch.randn(2, 3, 3, height, width, device=device))
    compare(mask[:1], (3, height, width), config, mask_gate=torch.tensor([True, False], device=device))
    pred = torch.randn(2, 4, 3, height, width, device=device).to(dtype)  # an even number of channels may be folded
    results = []
    for backend in ("triton", "reference"):
        leaf = pred.clone().requires_grad_()
        loss = masked_loss(leaf, -pred, mask.to(dtype), config, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for (got, want), rtol in zip(
        zip(*results, strict=True), (3e-6, 3e-6 if dtype == torch.float32 else 1e-2), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=rtol, atol=1e-9)


def test_one_frame_for_many_allocates_one_frame_of_weights():
    layout = Layout((1, 1, 480, 832), (480 * 832, 480 * 832, 832, 1), torch.float32)
    plan = plan_weights(layout, MaskedLossConfig(), (21, 60, 104), 1, False, False)
    assert (plan.shape[0], plan.writes) == (1, True)
    assert plan.launch.tiles * plan.launch.blocks_per_tile * plan.launch.block < 60 * 104 + plan.launch.block


def test_nan_in_a_window_is_nan_in_its_weight_and_nowhere_else(device):
    mask = masks((1, 1, 16, 32), torch.float32, device)
    mask[0, 0, 9, 17] = float("nan")
    pred = torch.randn(1, 2, 1, 2, 4, device=device).requires_grad_()
    loss = masked_loss(pred, torch.zeros_like(pred), mask, MaskedLossConfig(normalization="mean"), backend="triton")
    (gradient,) = torch.autograd.grad(loss, pred)
    expected = mask_weights(mask, shape=(1, 1, 2, 4))[0].isnan()
    assert expected.sum() == 1
    assert (gradient.isnan() == expected.unsqueeze(1)).all()
