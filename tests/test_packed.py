"""Packed tokens (B, T, 4 C), as the transformers of Qwen-Image and FLUX give them, against the unpacked picture."""

import pytest
import torch

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss

ROWS, COLUMNS = 3, 5


def packed(latents):
    """(B, C, H, W) as tokens: written from diffusers' description, (c, row in the patch, column in the patch)."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(batch, height // 2 * (width // 2), channels * 4)


def test_tokens_are_those_of_diffusers():
    pipeline = pytest.importorskip("diffusers.pipelines.qwenimage.pipeline_qwenimage").QwenImagePipeline
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(packed(latents), pipeline._pack_latents(latents.unsqueeze(1), 2, 16, 6, 10))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {}),
        ((2, 6, 10), {}),
        ((1, 6, 10), {"per_sample": True, "gamma": 0.7, "min_weight": 0.1}),
        ((2, 48, 80), {"loss_type": "huber"}),
        ((2, 7, 9), {"resample": "bilinear", "blur_kernel_size": 3}),
        ((2, 6, 10), {"blur_kernel_size": 5, "prior_threshold": 0.4, "area_scale_beta": 0.5}),
    ],
    ids=str,
)
def test_packed_tokens_have_the_loss_of_the_picture(device, backend, dtype, mask, options):
    """And their gradient, token by token; a prior, a flow target and statistics as well."""
    pred, noise, latents, prior = (torch.randn(2, 16, 6, 10, device=device).to(dtype) for _ in range(4))
    mask = None if mask is None else torch.rand(mask, device=device)
    config = MaskedLossConfig(**options)
    results = []
    for arrange, call in ((lambda x: x, {}), (packed, {"layout": "packed", "patches": (ROWS, COLUMNS)})):
        leaf = arrange(pred).requires_grad_()
        target = FlowTarget(arrange(noise), arrange(latents))
        loss, stats = masked_loss(
            leaf, target, mask, config, prior=arrange(prior), backend=backend, return_stats=True, **call
        )
        (gradient,) = torch.autograd.grad(loss * 3, leaf)
        results.append((loss.detach(), gradient if call else packed(gradient), *stats))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)


def test_a_wrong_grid_of_patches_is_refused():
    tokens = torch.randn(1, 15, 64)
    for given, said in (
        ({"layout": "packed"}, "needs patches"),
        ({"layout": "packed", "patches": (3, 4)}, "rows . columns"),
        ({"layout": "packed", "patches": (3.0, 5)}, "needs patches"),
        ({"patches": (3, 5)}, "drop it|pred must be"),
    ):
        with pytest.raises(ValueError, match=said):
            masked_loss(tokens, tokens, None, **given)
