"""OneTrainer: its own loss mixin where ONETRAINER_REPO names a checkout, its recorded functions and shapes elsewhere."""

import sys
import types

import pytest
import torch

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration import onetrainer
from tests.integration.checkouts import checkout

CONFIG = MaskedLossConfig(min_weight=0.05)
IMAGE, VIDEO = (2, 16, 6, 8), (2, 16, 3, 6, 8)


def example(shape):
    """bfloat16 prediction and targets; the mask at the size of the latents, one frame for a clip."""
    pred = torch.randn(shape).bfloat16().requires_grad_()
    mask = torch.rand(2, 1, *[1] * (len(shape) - 4), 6, 8) * torch.tensor([1.0, 0.2]).view(2, *[1] * (len(shape) - 1))
    return pred, torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16(), mask


@pytest.fixture
def module(monkeypatch):
    def masked_losses(losses, mask, unmasked_weight, normalize_masked_area_loss):
        raise AssertionError("the trainer's own")

    def masked_losses_with_prior(
        losses, prior_losses, mask, unmasked_weight, normalize_masked_area_loss, masked_prior_preservation_weight
    ):
        raise AssertionError("the trainer's own")

    module = types.ModuleType(onetrainer.MODULE)
    module.masked_losses, module.masked_losses_with_prior = masked_losses, masked_losses_with_prior
    monkeypatch.setitem(sys.modules, onetrainer.MODULE, module)
    return module


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("shape", [IMAGE, VIDEO], ids=["image", "video"])
def test_recorded_call(shape, weight, module):
    onetrainer.install(CONFIG)
    pred, target, prior, mask = example(shape)
    errors, prior_errors = ((pred.float() - other.float()) ** 2 for other in (target, prior))
    losses = module.masked_losses_with_prior(
        losses=errors,
        prior_losses=prior_errors,
        mask=mask,
        unmasked_weight=0.1,
        normalize_masked_area_loss=False,
        masked_prior_preservation_weight=weight,
    )
    options = {"prior": prior, "prior_weight": weight} if weight else {}
    want = masked_loss(pred, target, mask, CONFIG, **options)
    torch.testing.assert_close(losses.mean(list(range(1, len(shape)))).mean(), want)
    torch.testing.assert_close(
        module.masked_losses(errors, mask, 0.1, False).mean(), masked_loss(pred, target, mask, CONFIG)
    )


def test_a_picture_without_mask_gives_no_nan(module):
    """The trainer: (1 - 1) / 0 for the prior of a white mask, and 0 / 0 for an empty one."""
    onetrainer.install()
    errors = torch.rand(IMAGE)
    for mask, unmasked in ((torch.ones(2, 1, 6, 8), 0.1), (torch.zeros(2, 1, 6, 8), 0.0)):
        losses = module.masked_losses_with_prior(errors, errors, mask, unmasked, True, 0.5)
        assert losses.isfinite().all()


def test_an_unmasked_weight_of_1_is_no_mask(module):
    onetrainer.install()
    errors = torch.rand(IMAGE)
    assert torch.equal(module.masked_losses(errors, torch.zeros(2, 1, 6, 8), 1.0, False), errors)


def test_another_version_is_refused(module):
    module.masked_losses = lambda losses, mask: losses
    with pytest.raises(UserError, match=r"masked_losses takes \(losses, mask\).*supported is OneTrainer of 2026-08"):
        onetrainer.install()


def flow_losses(mixin, pred, target, prior, mask, **options):
    """The trainer's path from predictions to the loss of a batch, as its Qwen and HunyuanVideo setups walk it."""
    config = types.SimpleNamespace(
        mse_strength=1.0,
        mae_strength=0.0,
        log_cosh_strength=0.0,
        huber_strength=0.0,
        vb_loss_strength=0.0,
        masked_training=True,
        model_type=types.SimpleNamespace(has_conditioning_image_input=lambda: False),
        loss_scaler=types.SimpleNamespace(get_scale=lambda *sizes, **named: 1),
        batch_size=2,
        gradient_accumulation_steps=1,
        **{
            "unmasked_weight": 0.1,
            "normalize_masked_area_loss": False,
            "masked_prior_preservation_weight": 0.0,
            **options,
        },
    )
    data = {"loss_type": "target", "predicted": pred, "target": target}
    data |= {} if prior is None else {"prior_target": prior}
    batch = {"latent_mask": mask, "loss_weight": torch.ones(2)}
    return mixin._flow_matching_losses(batch, data, config, torch.device("cpu")).mean()


def test_its_own_mixin(monkeypatch):
    with checkout("ONETRAINER_REPO", monkeypatch) as load:
        mixin = type("Setup", (load(onetrainer.MODULE).ModelSetupDiffusionLossMixin,), {})()
        image, video = example(IMAGE), example(VIDEO)
        normalised = {"normalize_masked_area_loss": True, "masked_prior_preservation_weight": 0.3}
        stock = {
            (len(case[0].shape), len(options)): flow_losses(mixin, *case, **options).item()
            for case in (image, video)
            for options in ({}, {"masked_prior_preservation_weight": 0.3}, normalised)
        }
        onetrainer.install()  # the trainer's own settings: its number, where that is right
        for case in (image, video):
            for options in ({}, {"masked_prior_preservation_weight": 0.3}):
                ours = flow_losses(mixin, *case, **options).item()
                assert ours == pytest.approx(stock[len(case[0].shape), len(options)], rel=1e-5)
        assert flow_losses(mixin, *image, **normalised).item() == pytest.approx(stock[4, 2], rel=1e-5)
        # A video is normalised over the mask, not per column, as a picture of the same numbers is.
        still = [value[:, :, :1] for value in video]
        flat = flow_losses(mixin, *[value[:, :, 0] for value in still], **normalised)
        torch.testing.assert_close(flow_losses(mixin, *still, **normalised), flat)
        assert abs(flow_losses(mixin, *video, **normalised).item() - stock[5, 2]) > 1e-3

        onetrainer.install(CONFIG)
        for pred, target, prior, mask in (image, video):
            ours = flow_losses(mixin, pred, target, prior, mask, masked_prior_preservation_weight=0.3)
            torch.testing.assert_close(ours, masked_loss(pred, target, mask, CONFIG, prior=prior, prior_weight=0.3))
