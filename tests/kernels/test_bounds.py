"""Kernels touch nothing outside their tensors: inputs lie inside NaN, outputs inside canaries."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.kernels import loss as loss_kernels

CANARY = 12345.0
MARGIN = 64


def inside(values: torch.Tensor, gap: int, device: str) -> torch.Tensor:
    """The same numbers as a view of a larger buffer that is NaN everywhere else, `gap` elements between the rows."""
    shape = [*values.shape[:-1], values.shape[-1] + gap]
    buffer = torch.full((MARGIN + torch.Size(shape).numel() + MARGIN,), float("nan"), dtype=values.dtype, device=device)
    view = buffer[MARGIN:-MARGIN].view(shape)[..., : values.shape[-1]]
    view.copy_(values)
    return view


@pytest.mark.slow
@given(
    shape=st.tuples(*(st.sampled_from(sizes) for sizes in ([1, 2], [1, 3, 16, 17], [1, 3], [1, 7, 13], [1, 5, 26]))),
    gap=st.sampled_from([0, 1, 4]),
    mask_scale=st.sampled_from([1, 2, 3]),
    blur=st.sampled_from([0, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, phases=[Phase.generate])
def test_what_lies_around_the_inputs_is_never_used(device, shape, gap, mask_scale, blur, dtype):
    batch, _, frames, height, width = shape
    pred, target, prior = (torch.randn(shape).to(dtype) for _ in range(3))
    mask = torch.rand(batch, frames, height * mask_scale, width * mask_scale)
    results = []
    for place in (lambda x: x.to(device).contiguous(), lambda x: inside(x, gap, device)):
        leaf = place(pred).requires_grad_()
        config = MaskedLossConfig(blur_kernel_size=blur)
        loss = masked_loss(leaf, place(target), place(mask), config, prior=place(prior), backend="triton")
        (gradient,) = torch.autograd.grad(loss * 2, leaf)
        results.append((loss.detach(), gradient))
    for got, want in zip(results[1], results[0], strict=True):
        assert not got.isnan().any()
        torch.testing.assert_close(got, want, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-9)


@pytest.mark.parametrize("positions", [1, 127, 513, 988, 1025])
@pytest.mark.parametrize("channels", [1, 3, 16, 17])
def test_nothing_around_the_gradient_is_written(device, positions, channels, monkeypatch):
    """The gradient is allocated by the launcher; here it is given a place between canaries instead."""
    buffers = []

    def between_canaries(like, **_):
        buffer = torch.full((MARGIN + like.numel() + MARGIN,), CANARY, dtype=like.dtype, device=like.device)
        buffers.append(buffer)
        return buffer[MARGIN:-MARGIN].view(like.shape)

    pred, target = (torch.randn(2, channels, 1, 1, positions, device=device) for _ in range(2))
    leaf = pred.requires_grad_()
    with monkeypatch.context() as patched:
        patched.setattr(loss_kernels.torch, "empty_like", between_canaries)
        loss = masked_loss(leaf, target, torch.rand(2, 1, positions, device=device), backend="triton")
        (gradient,) = torch.autograd.grad(loss * 3, leaf)
    assert len(buffers) == 1
    assert (buffers[0][:MARGIN] == CANARY).all()
    assert (buffers[0][-MARGIN:] == CANARY).all()
    assert (gradient != CANARY).all()
    assert not gradient.isnan().any()
