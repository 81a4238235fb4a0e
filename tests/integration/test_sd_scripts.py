"""sd-scripts: its own process_batch where SD_SCRIPTS_REPO names a checkout, its recorded function and shapes elsewhere."""

import argparse
import sys
import types

import pytest
import torch

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.integration import sd_scripts
from tests.integration.checkouts import checkout

CONFIG = MaskedLossConfig(min_weight=0.05)


def example(kind: str, shape=(2, 16, 6, 8)):
    """bfloat16 prediction, float32 target; mask pictures (B, 3, H, W) in [-1, 1], or alpha (B, H, W) in [0, 1]."""
    pred, target = torch.randn(shape).bfloat16().requires_grad_(), torch.randn(shape)
    mask = torch.rand(2, 1, 48, 64) * torch.tensor([1.0, 0.2]).view(2, 1, 1, 1)
    if kind == "alpha":
        return pred, target, mask, {"alpha_masks": mask[:, 0]}
    # Green and blue differ, so that only the red channel gives the mask.
    pictures = torch.cat([mask, torch.rand(2, 2, 48, 64)], dim=1) * 2 - 1
    return pred, target, mask, {"conditioning_images": pictures, "alpha_masks": None}


@pytest.fixture
def library(monkeypatch):
    """The library's module with its function, and a script that imported the function by name."""

    def apply_masked_loss(loss, batch):
        raise AssertionError("the trainer's own")

    module, script = types.ModuleType("library.custom_train_functions"), types.ModuleType("train_network")
    module.apply_masked_loss = script.apply_masked_loss = apply_masked_loss
    monkeypatch.setitem(sys.modules, "library", types.ModuleType("library"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, script.__name__, script)
    return module


@pytest.mark.parametrize("kind", ["picture", "alpha"])
def test_recorded_call(kind, library):
    sd_scripts.install(CONFIG)
    pred, target, mask, batch = example(kind)
    errors = (pred.float() - target) ** 2
    weighted = sys.modules["train_network"].apply_masked_loss(errors, batch)
    assert weighted.shape == errors.shape
    torch.testing.assert_close(weighted.mean(dim=[1, 2, 3]).mean(), masked_loss(pred, target, mask, CONFIG))
    assert torch.equal(library.apply_masked_loss(errors, {"alpha_masks": None}), errors)


@pytest.mark.parametrize("kind", ["picture", "alpha"])
def test_its_own_process_batch(kind, monkeypatch):
    with checkout("SD_SCRIPTS_REPO", monkeypatch) as load:
        network = load("train_network")
        pred, target, mask, batch = example(kind)

        class Trainer(network.NetworkTrainer):
            def get_noise_pred_and_target(self, *arguments, **options):
                return pred, target, torch.tensor([300, 700]), None

            def post_process_loss(self, loss, args, timesteps, noise_scheduler):
                return loss

        args = argparse.Namespace(masked_loss=kind == "picture", loss_type="l2", vae_batch_size=None)
        batch |= {"latents": torch.randn(2, 16, 6, 8), "loss_weights": torch.ones(2)}
        batch["text_encoder_outputs_list"] = [torch.zeros(1)]
        accelerator = types.SimpleNamespace(device="cpu")

        def run():
            dtypes = [torch.float32] * 2
            rest = [None, None, None, None, None, *dtypes, accelerator, args, None, None]
            return Trainer().process_batch(batch, *rest, train_text_encoder=False)

        stock = run()
        sd_scripts.install(CONFIG)
        loss = run()
        torch.testing.assert_close(loss, masked_loss(pred, target, mask, CONFIG))
        assert abs(loss - stock) > 0.1 * stock  # it divides by no area
        sd_scripts.install(MaskedLossConfig.preset("sd-scripts"))
        torch.testing.assert_close(run(), stock)
