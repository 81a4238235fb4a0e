"""What a call tells beside the loss: errors inside and outside, the largest mask value, the mean weight."""

import unittest.mock

import pytest
import torch

from masked_loss_triton import MaskedLossConfig, checks, masked_loss


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_errors_inside_and_outside_are_means_weighted_by_the_raw_mask(device, backend):
    """The raw mask is that before gamma, floor and region; the trainer's weighting is no part of an error."""
    pred, target, prior = (torch.randn(2, 3, 2, 4, 4) for _ in range(3))
    mask = torch.rand(2, 2, 4, 4).round(decimals=1)
    config = MaskedLossConfig(invert=True, gamma=2.0, min_weight=0.3, loss_type="huber", loss_delta=0.7)
    gate = torch.tensor([True, False])
    given = {"prior": prior, "weighting": torch.tensor([2.0, 5.0]), "mask_gate": gate}
    given = {"return_stats": True, **{name: value.to(device) for name, value in given.items()}}
    tensors = (pred.to(device), target.to(device), mask.to(device))
    _, stats = masked_loss(*tensors, config, backend=backend, **given)
    m = torch.where(gate.view(-1, 1, 1, 1), 1 - mask, 1).unsqueeze(1).expand_as(pred)
    for name, other in (("error", target), ("drift", prior)):
        error = torch.nn.functional.huber_loss(pred, other, delta=0.7, reduction="none")
        inside, outside = (float((w * error).sum() / w.sum()) for w in (m, 1 - m))
        assert float(getattr(stats, f"{name}_inside")) == pytest.approx(inside, rel=1e-5)
        assert float(getattr(stats, f"{name}_outside")) == pytest.approx(outside, rel=1e-5)
    _, white = masked_loss(*tensors[:2], None, backend=backend, return_stats=True)
    assert float(white.error_outside) == float(white.drift_inside) == 0


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("blur", [0, 3])
@pytest.mark.parametrize(("size", "value", "dtype", "want"), [
    ((4, 4), 255.0, torch.float32, 255.0),
    ((8, 8), 1.25, torch.float32, 1.25),  # whole windows
    ((7, 9), -0.5, torch.float32, 0.0),  # the rest is 0
    ((4, 4), 51, torch.uint8, 0.2),
])  # fmt: skip
def test_stats_hold_the_largest_mask_value_before_the_clamp(device, backend, blur, size, value, dtype, want):
    """A mask of bytes as floats is refused where it can be seen, on a CPU that is not traced; elsewhere this tells of it."""
    mask = torch.zeros((2, 1, *size), dtype=dtype)
    mask[1, 0, -1, -1] = value
    tensors = [x.to(device) for x in (torch.randn(2, 3, 1, 4, 4), torch.zeros(2, 3, 1, 4, 4), mask)]
    config = MaskedLossConfig(blur_kernel_size=blur)
    with unittest.mock.patch.object(checks, "refuse_bytes_as_floats"):
        _, stats = masked_loss(*tensors, config, backend=backend, return_stats=True)
        _, none = masked_loss(*tensors[:2], None, config, backend=backend, return_stats=True)
    assert float(stats.mask_max) == pytest.approx(want)
    assert float(none.mask_max) == 1


def test_stats_are_a_table_and_floats():
    mask = torch.tensor([[[0.0, 0.5], [1.0, 1.0]]])
    _, stats = masked_loss(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), mask, return_stats=True)
    numbers = stats.to_dict()
    assert numbers == {name: value.item() for name, value in stats._asdict().items()}
    lines = str(stats).splitlines()
    assert lines[0].split() == ["mean", "min", "max"]
    assert "target weight          0.625           0           1" in lines
    assert len(lines) == 1 + len(numbers) - 2 * 3
