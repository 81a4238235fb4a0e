"""The variants of the kernels whose machine code is looked at, with their calls. Imports no Triton."""

from __future__ import annotations

import torch

from bench.cases import Case
from masked_loss_triton import MaskedLossConfig

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_THRESHOLD = MaskedLossConfig(prior_threshold=0.5, per_sample=True)
_STAGES = MaskedLossConfig(gamma=0.7, min_weight=0.05, loss_type="huber")

# By what the variant is there for. "main": contiguous float32 with a mask on the grid of the latents, the case of the limits.
VARIANTS = {
    "main": Case(),
    "main bf16": Case(dtype=BF16),
    "bf16 pred, fp32 target": Case(dtype=BF16, target_dtype=FP32),
    "main fp16": Case(dtype=FP16),
    "prior": Case(prior=True),
    "prior bf16": Case(dtype=BF16, prior=True),
    "prior threshold": Case(prior=True, config=_THRESHOLD, batch=2),
    "flow": Case(dtype=BF16, target_dtype=BF16, flow=True),
    "flow and prior": Case(dtype=BF16, target_dtype=BF16, flow=True, prior=True),
    "stages": Case(config=_STAGES),
    "stats": Case(stats=True, prior=True),
    "no mask": Case(mask="none"),
    "one frame": Case(mask="one frame"),
    "pixels": Case(mask="pixels"),
    "pixels uint8 bf16": Case(mask="pixels uint8", dtype=BF16),
    "pixels bilinear": Case(mask="pixels", config=MaskedLossConfig(resample="bilinear")),
    "pixels bicubic": Case(mask="pixels", config=MaskedLossConfig(resample="bicubic")),
    "blur": Case(config=MaskedLossConfig(blur_kernel_size=5)),
    "channels last": Case(memory="channels last"),
    "channels last bf16": Case(memory="channels last", dtype=BF16),
    "layered": Case(memory="layered", latents="16x7x68x120"),
    "layered bf16": Case(memory="layered", latents="16x7x68x120", dtype=BF16),
    "layered bf16 flow prior": Case(memory="layered", latents="16x7x68x120", dtype=BF16, flow=True, prior=True),
    "packed": Case(memory="packed", latents="16x1x116x208"),
    "packed bf16 flow prior": Case(memory="packed", latents="16x1x116x208", dtype=BF16, flow=True, prior=True),
    "cropped": Case(memory="cropped"),
    "cropped bf16 flow prior": Case(memory="cropped", dtype=BF16, flow=True, prior=True),
    "pixels blur": Case(mask="pixels", config=MaskedLossConfig(blur_kernel_size=5)),
    "48 channels pixels": Case(latents="48x31x44x80", mask="pixels"),
    "large": Case(latents="16x33x90x160"),
    "48 channels": Case(latents="48x31x44x80"),
    "image": Case(latents="16x1x116x208", batch=4),
    "26x38": Case(latents="16x1x26x38"),
    "26x38 bf16": Case(latents="16x1x26x38", dtype=BF16),
    "26x38 prior bf16": Case(latents="16x1x26x38", dtype=BF16, prior=True),
    "42x24": Case(latents="16x1x42x24"),
    "166x166 bf16": Case(latents="16x1x166x166", dtype=BF16),
}
