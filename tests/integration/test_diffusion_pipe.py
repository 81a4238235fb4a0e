"""diffusion-pipe: its own pipelines where DIFFUSION_PIPE_REPO names a checkout, its recorded calls elsewhere."""

import types

import pytest
import torch

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration import diffusion_pipe
from tests.integration.checkouts import checkout

CONFIG = MaskedLossConfig(min_weight=0.05)


def example(video: bool):
    """bfloat16 prediction; its masks are float16 at the size of the latents, one frame for a whole clip."""
    shape = (2, 16, 3, 6, 8) if video else (2, 16, 6, 8)
    mask = torch.rand((2, 1, 1, 6, 8) if video else (2, 1, 6, 8)).half()
    return torch.randn(shape).bfloat16().requires_grad_(), torch.randn(shape), mask


@pytest.mark.parametrize("video", [True, False])
def test_recorded_call(video):
    output, target, mask = example(video)
    loss_fn = diffusion_pipe.get_loss_fn(CONFIG)(types.SimpleNamespace(config={}))
    loss = loss_fn(output, (target, mask))
    loss.backward()
    assert torch.equal(loss, masked_loss(output, target, mask, CONFIG))
    assert torch.equal(loss_fn(output, (target, torch.empty(0))), masked_loss(output, target, None, CONFIG))


@pytest.mark.parametrize(("key", "kind"), [("huber_delta", "huber"), ("smooth_l1_beta", "smooth_l1")])
def test_the_loss_of_its_config_stays(key, kind):
    output, target, mask = example(True)
    loss_fn = diffusion_pipe.get_loss_fn(CONFIG)(types.SimpleNamespace(config={key: 0.3}))
    want = masked_loss(output, target, mask, CONFIG.replace(loss_type=kind, loss_delta=0.3))
    assert torch.equal(loss_fn(output, (target, mask)), want)


def pack(x):
    batch, channels, height, width = x.shape
    x = x.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, height * width // 4, channels * 4)


def test_packed_tokens():
    """Qwen-Image: (B, C, H, W) packed to (B, H/2 W/2, 4C); packing the mask along must not change the loss."""
    output, target, mask = example(False)
    packed = [pack(x) for x in (output, target, mask.expand(-1, 16, -1, -1))]
    loss = diffusion_pipe.loss_function(CONFIG)(packed[0], (packed[1], packed[2]))
    torch.testing.assert_close(loss, masked_loss(output, target, mask, CONFIG))
    with pytest.raises(UserError, match=r"shape of the output, \(2, 12, 64\), got \(2, 1, 6, 8\)"):
        diffusion_pipe.loss_function(CONFIG)(packed[0], (packed[1], mask))


def test_tokens_are_not_blurred():
    tokens = torch.zeros(2, 12, 64)
    with pytest.raises(UserError, match="blur_kernel_size cannot be used with packed tokens"):
        diffusion_pipe.loss_function(MaskedLossConfig(blur_kernel_size=3))(tokens, (tokens, tokens))


def test_its_own_pipelines(monkeypatch):
    with checkout("DIFFUSION_PIPE_REPO", monkeypatch) as load:
        base = load("models.base")
        for pipeline in (base.BasePipeline, base.ComfyPipeline):
            for settings in ({}, {"huber_delta": 0.3}, {"smooth_l1_beta": 0.3}):
                owner = types.SimpleNamespace(config=settings)
                output, target, mask = example(True)
                stock = pipeline.get_loss_fn(owner)(output, (target, mask))
                with monkeypatch.context() as patched:
                    patched.setattr(base.BasePipeline, "get_loss_fn", base.BasePipeline.get_loss_fn)
                    patched.setattr(base.ComfyPipeline, "get_loss_fn", base.ComfyPipeline.get_loss_fn)
                    diffusion_pipe.install(MaskedLossConfig.preset("diffusion-pipe"))
                    loss = pipeline.get_loss_fn(owner)(output, (target, mask))
                    torch.testing.assert_close(loss, stock)
                    diffusion_pipe.install(CONFIG)
                    assert abs(pipeline.get_loss_fn(owner)(output, (target, mask)) - stock) > 0.1 * stock
