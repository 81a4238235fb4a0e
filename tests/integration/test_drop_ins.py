"""The drop-ins, called as the trainers call them: shapes, dtypes and ranges of their call sites."""

import pytest
import torch

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.integration import diffusion_pipe, simpletuner

CONFIG = MaskedLossConfig(min_weight=0.05)


@pytest.mark.parametrize("shape", [(2, 16, 3, 6, 8), (2, 16, 6, 8)], ids=["video", "image"])
def test_diffusion_pipe(shape):
    output, target = torch.randn(shape, dtype=torch.bfloat16, requires_grad=True), torch.randn(shape)
    # Its masks are float16 at the size of the latents, one frame for a whole clip.
    mask = torch.rand((2, 1, 1, 6, 8) if len(shape) == 5 else (2, 1, 6, 8)).half()
    loss_fn = diffusion_pipe.get_loss_fn(CONFIG)(None)
    loss = loss_fn(output, (target, mask))
    loss.backward()
    assert torch.equal(loss, masked_loss(output, target, mask, CONFIG))
    assert torch.equal(loss_fn(output, (target, torch.empty(0))), masked_loss(output, target, None, CONFIG))


def test_diffusion_pipe_with_packed_tokens():
    """Qwen-Image: (B, C, H, W) packed to (B, H/2 W/2, 4C); packing the mask along must not change the loss."""

    def pack(x):
        batch, channels, height, width = x.shape
        x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(batch, height * width // 4, channels * 4)

    output, target, mask = torch.randn(2, 16, 6, 8), torch.randn(2, 16, 6, 8), torch.rand(2, 1, 6, 8)
    packed = [pack(x) for x in (output, target, mask.expand(-1, 16, -1, -1))]
    loss = diffusion_pipe.loss_function(CONFIG)(packed[0], (packed[1], packed[2]))
    torch.testing.assert_close(loss, masked_loss(output, target, mask, CONFIG))
    with pytest.raises(ValueError, match=r"shape of the output, \(2, 12, 64\), got \(2, 1, 6, 8\)"):
        diffusion_pipe.loss_function(CONFIG)(packed[0], (packed[1], mask))


class Model:
    """The two methods of a SimpleTuner model that its loss uses."""

    def get_prediction_target(self, prepared_batch):
        return prepared_batch["noise"] - prepared_batch["latents"]

    def loss(self, prepared_batch, model_output, apply_conditioning_mask=True):
        target = self.get_prediction_target(prepared_batch)
        return ((model_output["model_prediction"].float() - target) ** 2).mean()


@pytest.mark.parametrize("kind", ["mask", "segmentation"])
def test_simpletuner(kind):
    noise, latents, pred = (torch.randn(2, 16, 6, 8) for _ in range(3))
    pixels = torch.rand(2, 3, 48, 64) * 2 - 1
    batch = {"noise": noise, "latents": latents, "loss_mask_type": kind, "conditioning_pixel_values": pixels}
    loss = simpletuner.wrap(Model.loss, CONFIG)(Model(), batch, {"model_prediction": pred})
    channel = pixels[:, :1] if kind == "mask" else pixels.mean(1, keepdim=True)
    torch.testing.assert_close(loss, masked_loss(pred, noise - latents, channel / 2 + 0.5, CONFIG))


def test_simpletuner_takes_the_mask_and_not_the_reference_picture():
    pixels, reference = torch.rand(2, 3, 48, 64) * 2 - 1, torch.zeros(2, 3, 48, 64)
    batch = {"loss_mask_type": "mask", "conditioning_pixel_values": [reference, pixels]}
    torch.testing.assert_close(simpletuner.mask_of(batch), pixels[:, :1] / 2 + 0.5)


def test_simpletuner_refuses_clips_of_masks():
    batch = {"loss_mask_type": "mask", "conditioning_pixel_values": torch.zeros(2, 5, 3, 48, 64)}
    with pytest.raises(ValueError, match=r"one picture per sample, \(B, 3, H, W\), got \(2, 5, 3, 48, 64\)"):
        simpletuner.mask_of(batch)
    assert simpletuner.mask_of({"loss_mask_type": "mask", "conditioning_pixel_values": []}) is None


def test_diffusion_pipe_refuses_to_blur_tokens():
    tokens = torch.zeros(2, 12, 64)
    with pytest.raises(ValueError, match="blur_kernel_size cannot be used with packed tokens"):
        diffusion_pipe.loss_function(MaskedLossConfig(blur_kernel_size=3))(tokens, (tokens, tokens))


@pytest.mark.parametrize("apply", [True, False])
def test_simpletuner_without_a_mask_keeps_its_own_loss(apply):
    noise, latents, pred = (torch.randn(2, 16, 6, 8) for _ in range(3))
    batch = {"noise": noise, "latents": latents, "loss_mask_type": None if apply else "mask"}
    batch["conditioning_pixel_values"] = torch.rand(2, 3, 48, 64)
    loss = simpletuner.wrap(Model.loss, CONFIG)(Model(), batch, {"model_prediction": pred}, apply)
    assert torch.equal(loss, Model().loss(batch, {"model_prediction": pred}))
