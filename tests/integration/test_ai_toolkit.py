"""ai-toolkit: its own SDTrainer.calculate_loss where AI_TOOLKIT_REPO names a checkout, its recorded call elsewhere."""

import types

import pytest
import torch

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration import ai_toolkit
from tests.integration.checkouts import checkout

CONFIG = MaskedLossConfig(min_weight=0.05)
IMAGE, VIDEO = (2, 16, 6, 8), (2, 16, 3, 6, 8)
OPTIONS = {
    "train_turbo": False,
    "inverted_mask_prior": False,
    "inverted_mask_prior_multiplier": 0.5,
    "loss_type": "mse",
    "pred_scaler": 1.0,
}


def example(shape, prior=False):
    """Its call: bfloat16 prediction, mask (B, 1, H, W) at the size of the pictures, a multiplier of mean 1 already made."""
    pred = torch.randn(shape).bfloat16().requires_grad_()
    mask = torch.rand(2, 1, 48, 64) * torch.tensor([1.0, 0.2]).view(2, 1, 1, 1)
    batch = types.SimpleNamespace(
        mask_tensor=mask,
        latents=torch.randn(shape),
        loss_multiplier_list=[1.0, 1.0],
        get_is_reg_list=lambda: [False, False],
        audio_pred=None,
        audio_target=None,
    )
    call = {
        "noise_pred": pred,
        "noise": torch.randn(shape),
        "noisy_latents": torch.randn(shape),
        "timesteps": torch.tensor([300.0, 700.0]),
        "batch": batch,
        "mask_multiplier": torch.ones(2, 1, 6, 8),
        "prior_pred": torch.randn(shape).bfloat16() if prior else None,
    }
    return call, call["noise"] - batch.latents, mask


class Recorded:
    """What the trainer's function does with the multiplier and with its own prior term."""

    def calculate_loss(
        self, noise_pred, noise, noisy_latents, timesteps, batch, mask_multiplier=1.0, prior_pred=None, **kwargs
    ):
        if noise_pred.dim() == 5:
            mask_multiplier = mask_multiplier.unsqueeze(2).repeat(1, 1, noise_pred.shape[2], 1, 1)
        losses = (noise_pred.float() - (noise - batch.latents)) ** 2 * mask_multiplier
        loss = losses.mean()
        if self.train_config.inverted_mask_prior and prior_pred is not None:
            everywhere = (noise_pred.float() - prior_pred.float()) ** 2
            loss = loss + everywhere.mean() * self.train_config.inverted_mask_prior_multiplier
        return loss


@pytest.fixture(params=["recorded", "checkout"])
def trainer(request, monkeypatch):
    """(a subclass of the trainer's class, the `self` of its loss)."""
    sd = types.SimpleNamespace(
        do_masked_loss=True, is_flow_matching=True, prediction_type="epsilon", scale_loss=lambda loss: loss
    )
    if request.param == "recorded":
        owner = type("SDTrainer", (Recorded,), {})
        yield owner, types.SimpleNamespace(train_config=types.SimpleNamespace(**OPTIONS), sd=sd)
        return
    with checkout("AI_TOOLKIT_REPO", monkeypatch) as load:
        module = load(ai_toolkit.MODULE)
        options = load("toolkit.config_modules").TrainConfig(dtype="bf16")
        self = types.SimpleNamespace(
            train_config=options, sd=sd, device_torch=torch.device("cpu"), dfe=None, adapter=None, additional_logs={}
        )
        yield type("SDTrainer", (module.SDTrainer,), {}), self


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("shape", [IMAGE, VIDEO], ids=["image", "video"])
def test_the_loss_has_the_weights_of_the_config(shape, prior, trainer):
    owner, self = trainer
    self.train_config.inverted_mask_prior = prior
    ai_toolkit.install(CONFIG, owner)
    call, target, mask = example(shape, prior)
    loss = owner.calculate_loss(self, **call)
    options = {"prior": call["prior_pred"], "prior_weight": 0.5} if prior else {}
    want = masked_loss(call["noise_pred"], target, mask, CONFIG, **options)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    (one,), (other,) = (torch.autograd.grad(value, call["noise_pred"]) for value in (loss, want))
    torch.testing.assert_close(one, other)
    assert self.train_config.inverted_mask_prior_multiplier == 0.5


def test_every_sample_has_its_own_prior_region(trainer):
    """The trainer takes the region of the first sample for the whole batch. Here the second has none, and no gradient."""
    owner, self = trainer
    self.train_config.inverted_mask_prior = True
    ai_toolkit.install(MaskedLossConfig(), owner)
    call, target, _ = example(IMAGE, prior=True)
    call["batch"].mask_tensor = torch.stack([torch.zeros(1, 48, 64), torch.ones(1, 48, 64)])
    pred = call["noise_pred"]
    (gradient,) = torch.autograd.grad(owner.calculate_loss(self, **call), pred)
    # Sample 0 is held to the prior alone, sample 1 to the target alone.
    for sample, other in ((0, call["prior_pred"].float()), (1, target)):
        difference = pred.detach()[sample].float() - other[sample]
        assert torch.equal(gradient[sample].sign(), difference.sign().bfloat16())


def test_white_and_empty_masks_give_no_nan(trainer):
    owner, self = trainer
    self.train_config.inverted_mask_prior = True
    ai_toolkit.install(MaskedLossConfig(), owner)
    for value in (0.0, 1.0):
        call, *_ = example(VIDEO, prior=True)
        call["batch"].mask_tensor = torch.full((2, 1, 48, 64), value)
        assert owner.calculate_loss(self, **call).isfinite()


@pytest.mark.parametrize("reason", ["no mask", "model"])
def test_without_a_mask_it_is_the_trainers_own(reason, trainer):
    owner, self = trainer
    call, *_ = example(IMAGE)
    if reason == "no mask":
        call["batch"].mask_tensor = None
    else:
        self.sd.do_masked_loss = False
    stock = owner.calculate_loss(self, **call)
    ai_toolkit.install(CONFIG, owner)
    assert torch.equal(owner.calculate_loss(self, **call), stock)


def test_what_it_would_get_wrong_is_refused(trainer):
    owner, self = trainer
    ai_toolkit.install(CONFIG, owner)
    call, *_ = example(IMAGE)
    call["batch"].mask_tensor = torch.ones(3, 1, 48, 64)
    with pytest.raises(UserError, match="3 masks came with 2 predictions: switch single_item_batching off"):
        owner.calculate_loss(self, **call)
    call, *_ = example(IMAGE, prior=True)
    self.train_config.inverted_mask_prior, self.train_config.snr_gamma = True, 5.0
    with pytest.raises(UserError, match="inverted_mask_prior cannot be combined with snr_gamma"):
        owner.calculate_loss(self, **call)
    self.train_config.train_turbo = True
    with pytest.raises(UserError, match="train_turbo"):
        owner.calculate_loss(self, **call)


def test_another_version_is_refused():
    class SDTrainer:
        def calculate_loss(self, pred, batch):
            return 0

    with pytest.raises(UserError, match=r"SDTrainer.calculate_loss takes \(self, pred, batch\).*ai-toolkit 0.12.26"):
        ai_toolkit.install(CONFIG, SDTrainer)
