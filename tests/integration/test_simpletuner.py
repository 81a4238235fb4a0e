"""SimpleTuner: its own ModelFoundation.loss where SIMPLETUNER_REPO names a checkout, its recorded calls elsewhere."""

import types

import pytest
import torch
import torch.nn.functional as F

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration import simpletuner
from tests.integration.checkouts import checkout

CONFIG = MaskedLossConfig(min_weight=0.05)
IMAGE, VIDEO = (2, 16, 6, 8), (2, 16, 3, 6, 8)


def example(shape=IMAGE, kind="mask"):
    """A flow matching batch: float32 mask pictures (B, 3, H, W) in [-1, 1], whose channels differ."""
    noise, latents, pred = (torch.randn(shape) for _ in range(3))
    pixels = torch.rand(2, 3, 48, 64) * torch.tensor([1.0, 0.2]).view(2, 1, 1, 1) * 2 - 1
    batch = {"noise": noise, "latents": latents, "loss_mask_type": kind, "conditioning_pixel_values": pixels}
    mask = (pixels[:, :1] if kind == "mask" else pixels.mean(1, keepdim=True)) / 2 + 0.5
    return batch, pred.bfloat16().requires_grad_(), noise - latents, mask


class Model:
    """What the loss of a SimpleTuner model uses, and what it does with a mask."""

    PREDICTION_TYPE = None
    diff2flow_bridge = None

    def __init__(self, **config):
        self.config = types.SimpleNamespace(**{"loss_type": "l2", "masked_loss_probability": 1.0, **config})

    def get_prediction_target(self, prepared_batch):
        return prepared_batch["noise"] - prepared_batch["latents"]

    def loss(self, prepared_batch, model_output, apply_conditioning_mask=True):
        errors = (model_output["model_prediction"].float() - self.get_prediction_target(prepared_batch)) ** 2
        if apply_conditioning_mask and prepared_batch["loss_mask_type"] == "mask":
            red = prepared_batch["conditioning_pixel_values"].float()[:, 0].unsqueeze(1)
            errors = errors * (F.interpolate(red, size=errors.shape[2:], mode="area") / 2 + 0.5)
        return errors.mean()


@pytest.fixture(params=["recorded", "checkout"])
def original(request, monkeypatch):
    """The trainer's loss, ours or its own."""
    if request.param == "recorded":
        yield Model.loss
    else:
        with checkout("SIMPLETUNER_REPO", monkeypatch) as load:
            common = load("simpletuner.helpers.models.common")
            monkeypatch.setattr(Model, "PREDICTION_TYPE", common.PredictionTypes.FLOW_MATCHING)
            yield common.ModelFoundation.loss


@pytest.mark.parametrize("kind", ["mask", "segmentation"])
@pytest.mark.parametrize("shape", [IMAGE, VIDEO], ids=["image", "video"])
def test_the_loss_has_the_weights_of_the_config(shape, kind, original):
    batch, pred, _, mask = example(shape, kind)
    before = dict(batch)
    loss = simpletuner.wrap(original, CONFIG)(Model(), batch, {"model_prediction": pred})
    want = masked_loss(pred, batch["noise"] - batch["latents"], mask, CONFIG)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    (one,), (other,) = torch.autograd.grad(loss, pred), torch.autograd.grad(want, pred)
    torch.testing.assert_close(one, other)
    assert all(batch[key] is before[key] for key in before)


def test_outside_the_mask_the_gradient_is_exactly_0(original):
    batch, pred, *_ = example(VIDEO)
    batch["conditioning_pixel_values"][:, :, :, :32] = -1.0
    simpletuner.wrap(original, MaskedLossConfig())(Model(), batch, {"model_prediction": pred}).backward()
    assert pred.grad[..., :4].abs().max() == 0
    assert (pred.grad[..., 4:] != 0).float().mean() > 0.99


def test_a_preset_is_the_trainers_own_number(original):
    batch, pred, *_ = example()
    output = {"model_prediction": pred}
    stock = original(Model(), batch, output)
    loss = simpletuner.wrap(original, MaskedLossConfig.preset("simpletuner"))(Model(), batch, output)
    torch.testing.assert_close(loss, stock)
    assert abs(simpletuner.wrap(original, CONFIG)(Model(), batch, output) - stock) > 0.1 * stock


@pytest.mark.parametrize("apply", [True, False])
def test_without_a_mask_it_is_the_trainers_own(apply, original):
    batch, pred, *_ = example()
    batch["loss_mask_type"] = None if apply else "mask"
    loss = simpletuner.wrap(original, CONFIG)(Model(), batch, {"model_prediction": pred}, apply)
    assert torch.equal(loss, original(Model(), batch, {"model_prediction": pred}, False))


def test_probability_is_the_trainers(original):
    batch, pred, *_ = example(kind="segmentation")
    loss = simpletuner.wrap(original, CONFIG)
    never = loss(Model(masked_loss_probability=0.0), batch, {"model_prediction": pred})
    assert torch.equal(never, original(Model(), batch, {"model_prediction": pred}, False))
    # Of a mask it takes no notice.
    batch["loss_mask_type"] = "mask"
    assert loss(Model(masked_loss_probability=0.0), batch, {"model_prediction": pred}) != never


def test_a_loss_that_calls_its_base_masks_once(original):
    batch, pred, _, mask = example()
    inner = simpletuner.wrap(original, CONFIG)
    outer = simpletuner.wrap(lambda *arguments: inner(*arguments), CONFIG)
    loss = outer(Model(), batch, {"model_prediction": pred})
    torch.testing.assert_close(
        loss, masked_loss(pred, batch["noise"] - batch["latents"], mask, CONFIG), rtol=1e-5, atol=0
    )


def test_a_segmentation_keeps_its_grey_values_unless_told():
    batch, pred, target, mask = example(kind="segmentation")
    binary = CONFIG.replace(binarize=0.0)
    loss = simpletuner.wrap(Model.loss, binary)(Model(), batch, {"model_prediction": pred})
    torch.testing.assert_close(loss, masked_loss(pred, target, mask, binary), rtol=1e-5, atol=0)


def test_the_mask_and_not_the_reference_picture():
    """With both in a batch the trainer keeps the first of the list, the reference."""
    batch, *_, mask = example()
    pixels = batch["conditioning_pixel_values"]
    batch["conditioning_pixel_values"] = [torch.zeros_like(pixels), pixels]

    def prepare_batch_conditions(self, batch, state):
        batch["conditioning_pixel_values"] = batch["conditioning_pixel_values"][0]
        return batch

    prepared = simpletuner._keep_the_mask(prepare_batch_conditions)(None, batch, {})
    torch.testing.assert_close(simpletuner.mask_of(prepared), mask)
    assert prepared["conditioning_pixel_values"].abs().max() == 0  # the model still gets the reference


def test_clips_of_masks_are_refused():
    batch = {"loss_mask_type": "mask", "conditioning_pixel_values": torch.zeros(2, 5, 3, 48, 64)}
    with pytest.raises(UserError, match=r"one picture per sample, \(B, 3, H, W\), got \(2, 5, 3, 48, 64\)"):
        simpletuner.mask_of(batch)
    assert simpletuner.mask_of({"loss_mask_type": "mask", "conditioning_pixel_values": []}) is None


def test_install_in_the_trainer(monkeypatch):
    with checkout("SIMPLETUNER_REPO", monkeypatch) as load:
        common = load("simpletuner.helpers.models.common")
        own, prepare = common.ModelFoundation.loss, common.ModelFoundation.prepare_batch_conditions
        simpletuner.install(CONFIG)
        try:
            assert common.ModelFoundation.loss.masked_loss_original is own
            monkeypatch.setattr(Model, "PREDICTION_TYPE", common.PredictionTypes.FLOW_MATCHING)
            batch, pred, target, mask = example()
            loss = common.ModelFoundation.loss(Model(), batch, {"model_prediction": pred})
            torch.testing.assert_close(loss, masked_loss(pred, target, mask, CONFIG), rtol=1e-5, atol=0)
        finally:
            common.ModelFoundation.loss, common.ModelFoundation.prepare_batch_conditions = own, prepare
