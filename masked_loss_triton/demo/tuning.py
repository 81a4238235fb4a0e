"""Flow matching: a base model learns the world, then LoRAs learn the subjects with different masked losses.

x_t = (1 - t) x_0 + t noise, and the model predicts noise - x_0 (the rectified flow of HunyuanVideo, WAN and Qwen-Image).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss
from masked_loss_triton.call import Backend
from masked_loss_triton.demo.encoder import encode
from masked_loss_triton.demo.model import Model, captions, predict

BATCH = 6
BASE_LEARNING_RATE = 4e-3
LORA_LEARNING_RATE = 1e-2
WARM_UP = 10  # steps
CROPS_PER_PICTURE = 12

AfterStep = Callable[[int, float], None]  # gets the step (from 1) and its loss


@dataclass(frozen=True)
class Way:
    """One of the ways to tune: its name, its loss, and what the loss is given."""

    key: str
    title: str
    config: MaskedLossConfig
    uses_mask: bool = True
    uses_prior: bool = False


WAYS = (
    Way("no_mask", "no mask", MaskedLossConfig(), uses_mask=False),
    Way("mask", "mask", MaskedLossConfig()),
    Way("mask_min_weight", "mask + minimum weight", MaskedLossConfig(min_weight=0.1)),
    Way("mask_prior", "mask + prior", MaskedLossConfig(prior_weight=1.0), uses_prior=True),
)


@dataclass(frozen=True)
class Examples:
    """What is trained on: names, latents float32 (N, 16, 1, h, w), and masks float32 (N, 1, h, w) or None."""

    names: Sequence[str]
    latents: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """One training batch: which examples, float32 noise (B, 16, 1, h, w) and times (B,) in (0, 1)."""

    index: Tensor
    noise: Tensor
    time: Tensor


def draws(examples: Examples, steps: int, seed: int) -> Iterator[Draw]:
    """The batches of a whole training, from the seed alone, so that every way of tuning gets the very same ones.

    Drawn on the CPU: a GPU's random numbers differ from model to model.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, device = examples.latents.shape[1:], examples.latents.device
    count = len(examples.names)
    for _ in range(steps):
        index = torch.randperm(count, generator=generator)[:BATCH]
        noise = torch.randn((len(index), *shape), generator=generator)
        # One time from each of B equal parts of (0, 1): every batch sees low and high noise, which halves the scatter.
        parts = torch.randperm(len(index), generator=generator) + torch.rand(len(index), generator=generator)
        yield Draw(index.to(device), noise.to(device), (parts / len(index)).to(device))


def world_examples(pictures: Sequence[tuple[str, np.ndarray]], side: int, seed: int, device: torch.device) -> Examples:
    """Random square crops, half of them mirrored, of the world's pictures, encoded at `side` pixels."""
    random = np.random.default_rng(seed)
    names, latents = [], []
    for name, rgb in pictures:
        for _ in range(CROPS_PER_PICTURE):
            size = int(random.uniform(0.4, 1.0) * min(rgb.shape[:2]))
            top, left = (random.integers(0, length - size + 1) for length in rgb.shape[:2])
            crop = rgb[top : top + size, left : left + size]
            crop = crop[:, ::-1] if random.random() < 0.5 else crop
            latents.append(encode(cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA)))
            names.append(name)
    return Examples(names, torch.stack(latents).to(device))


def noisy_latents(latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t for latents and noise (B, C, F, H, W) and times (B,)."""
    t = time.view(-1, 1, 1, 1, 1)
    return (1 - t) * latents + t * noise


def train_base(model: Model, world: Examples, steps: int, seed: int, backend: Backend, after_step: AfterStep) -> None:
    """Trains all of `model`, in place, on the world, without masks."""
    way = Way("base", "base model", MaskedLossConfig(), uses_mask=False)
    _train(model, world, way, draws(world, steps, seed), steps, BASE_LEARNING_RATE, backend, after_step)


def tune(
    model: Model, subjects: Examples, way: Way, steps: int, seed: int, backend: Backend, after_step: AfterStep
) -> None:
    """Trains the LoRA of `model`, in place, on the subjects in one way. The same seed gives every way the same noise and
    times; the loss is all that differs."""
    _train(model, subjects, way, draws(subjects, steps, seed), steps, LORA_LEARNING_RATE, backend, after_step)


def _train(
    model: Model,
    examples: Examples,
    way: Way,
    batches: Iterator[Draw],
    steps: int,
    learning_rate: float,
    backend: Backend,
    after_step: AfterStep,
) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    text = captions(examples.names, examples.latents.device)
    model.train()
    for step, draw in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / WARM_UP, (steps - step) / steps * 1.25, 1.0)
        latents = examples.latents[draw.index]
        noisy = noisy_latents(latents, draw.noise, draw.time)
        prior = _teacher(model, noisy, draw.time, text[draw.index]) if way.uses_prior else None
        pred = predict(model, noisy, draw.time, text[draw.index])
        mask = examples.masks[draw.index] if way.uses_mask and examples.masks is not None else None
        loss = masked_loss(pred, FlowTarget(draw.noise, latents), mask, way.config, backend=backend, prior=prior)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(step + 1, loss.item())
    model.eval()


@torch.no_grad()
def _teacher(model: Model, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
    """What the base model predicts: the same network with its LoRA switched off, on the same noise and times."""
    model.disable_adapters()
    try:
        return predict(model, noisy, time, text)
    finally:
        model.enable_adapters()
