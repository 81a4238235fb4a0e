"""How a call reaches its kernels: through few frames, with few arguments, and with an error for a word that no kernel knows."""

import sys

import pytest
import torch

pytest.importorskip("triton")

from masked_loss_triton import MaskedLossConfig, masked_loss
from tests.support.replayed import KERNELS


class Counted:
    """A kernel that notes how many frames of the project lie between `masked_loss` and its launch, both included."""

    def __init__(self, kernel, depths):
        self.kernel, self.depths = kernel, depths

    def __getitem__(self, grid):
        frame, depth = sys._getframe(1), 0
        while frame is not None and frame.f_globals.get("__name__") != __name__:
            depth += frame.f_globals.get("__name__", "").startswith("masked_loss_triton.")
            frame = frame.f_back
        self.depths[self.kernel.__name__] = max(depth, self.depths.get(self.kernel.__name__, 0))
        return self.kernel[grid]


def test_at_most_five_frames_lie_between_the_public_function_and_a_launch(device, monkeypatch):
    depths = {}
    for name, module in KERNELS.items():
        monkeypatch.setattr(module, name, Counted(getattr(module, name), depths))
    pred = torch.randn(2, 3, 1, 4, 6, device=device, requires_grad=True)
    config = MaskedLossConfig(blur_kernel_size=3)
    masked_loss(pred, torch.zeros_like(pred), torch.rand(2, 4, 6, device=device), config, backend="triton").backward()
    assert depths.keys() == KERNELS.keys()
    assert max(depths.values()) <= 5, depths


def test_no_kernel_has_more_than_twenty_parameters():
    for name, module in KERNELS.items():
        assert len(getattr(module, name).arg_names) <= 20, name


@pytest.mark.parametrize(
    "field", ["loss_type", "normalization", "floor", "resample"], ids=lambda field: f"an unknown {field}"
)
def test_no_kernel_takes_an_unknown_word_for_another(device, field):
    """A config that was not validated: as of a contributor who has added the word to the config alone."""
    config = MaskedLossConfig()
    object.__setattr__(config, field, "of my own")
    pred = torch.randn(1, 3, 1, 4, 6, device=device)
    with pytest.raises(Exception, match=r"unknown|of my own"):
        masked_loss(pred, -pred, torch.rand(1, 8, 12, device=device), config, backend="triton")
