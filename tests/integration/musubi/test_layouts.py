"""How latents and losses of the families lie: one loss, whatever the order of the axes."""

from __future__ import annotations

import types

import pytest
import torch
from accelerate import Accelerator

from masked_loss_triton import masked_loss
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.integration.musubi.layouts import grid_of, times_watermark
from masked_loss_triton.integration.musubi.options import MaskOptions
from masked_loss_triton.integration.musubi.training import MaskedTraining


@pytest.mark.parametrize("family", FAMILIES)
def test_every_order_of_the_axes_gives_one_loss(family):
    entry = FAMILIES[family]
    frames = 1 if entry.fps is None else 3
    generator = torch.Generator().manual_seed(0)
    pred, target, prior, latents = torch.randn(4, 2, 6, frames, 4, 5, generator=generator)
    mask = torch.rand(2, 1, frames, 4, 5, generator=generator)

    def ordered(tensor: torch.Tensor, axes: str) -> torch.Tensor:
        names = {"C": 1, "F": 2, "H": 3, "W": 4}
        if axes == "NC":
            return tensor.flatten(2).transpose(1, 2).contiguous()
        tensor = tensor.permute(0, *(names[axis] for axis in axes), *(() if "F" in axes else (2,)))
        return (tensor if "F" in axes else tensor.squeeze(-1)).contiguous()

    given = ordered(latents, entry.latent_axes)
    assert grid_of(given, entry.latent_axes) == (frames, 4, 5)
    training = MaskedTraining(MaskOptions(use_mask_loss=True, inverted_mask_prior=True), entry)
    args = types.SimpleNamespace(seed=1, max_train_steps=4, logging_dir=None)
    model = torch.nn.Linear(2, 2)
    model.forward = types.MethodType(lambda self, x: x, torch.nn.Linear(2, 2))
    model.forward.__self__.multiplier = 1.0
    batch = {"latents": given, "mask_weights_x": mask}
    step = training.begin(args, Accelerator(cpu=True), model, batch, torch.tensor([500.0, 600.0]))
    assert step.needs_teacher
    step.prior = ordered(prior, entry.loss_axes)
    ours = training.loss(ordered(pred, entry.loss_axes), ordered(target, entry.loss_axes), step, None)
    expected = masked_loss(pred, target, mask, training.config, prior=prior, prior_weight=0.5)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_what_is_kept_of_a_prediction_is_inside_the_mask():
    training = MaskedTraining(MaskOptions(use_mask_loss=True), FAMILIES["hidream"])
    pred, target = torch.randn(2, 1, 6, 3)
    mask = torch.tensor([1, 1, 0.25, 0, 0, 0]).reshape(1, 1, 1, 2, 3)
    step = types.SimpleNamespace(mask=mask, positions=(1, 2, 3))
    kept = training.inside(pred, target, step)
    assert torch.equal(kept[:, :2], pred[:, :2])
    assert torch.equal(kept[:, 3:], target[:, 3:])
    torch.testing.assert_close(kept[:, 2], 0.25 * pred[:, 2] + 0.75 * target[:, 2])
    step.mask = None
    assert training.inside(pred, target, step) is pred


@pytest.mark.parametrize("invert", [False, True])
def test_the_trainers_own_watermark_mask_is_never_lost(invert):
    grid = (2, 2, 3)
    mask, watermark = torch.rand(2, 1, *grid), torch.ones(2, 8, 12)
    watermark[:, :4, :4] = 0  # the first cell
    watermark[:, :2, 4:8] = 0  # half of the second
    clean = torch.tensor([[0, 0.5, 1], [1, 1, 1]])
    assert times_watermark(mask, {}, grid, invert) is mask
    batch = {"watermark_mask": watermark}

    def weight(value: torch.Tensor | None) -> torch.Tensor:
        assert value is not None
        return 1 - value if invert else value

    torch.testing.assert_close(weight(times_watermark(mask, batch, grid, invert)), weight(mask) * clean)
    unmasked = weight(times_watermark(None, batch, grid, invert))
    torch.testing.assert_close(unmasked, clean.expand(2, 1, *grid))
