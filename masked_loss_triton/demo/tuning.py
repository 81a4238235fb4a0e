"""Flow matching: a base model learns places, then LoRAs learn subjects with different masked losses.

x_t = (1 - t) x_0 + t noise, and the model predicts noise - x_0 (the rectified flow of HunyuanVideo, WAN and Qwen-Image).
The caption of a subject is its word and the word of a place, which is drawn anew at every step, whatever stands behind the
subject in the photograph: no place's word comes to mean that background.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import torch
from torch import Tensor

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss
from masked_loss_triton.call import Backend
from masked_loss_triton.demo.encoder import encode
from masked_loss_triton.demo.model import Model, captions, predict
from masked_loss_triton.demo.photos import shipped_places
from masked_loss_triton.routing import routed

BATCH = 8
BASE_LEARNING_RATE = 2e-3
LORA_LEARNING_RATE = 5e-3
WARM_UP = 0.04  # of the steps; the last 0.8 of them the rate falls to 0
TIME_SPREAD = 1.2  # of the logarithm of the odds t : 1 - t, which is normal as in the trainers' "sigmoid" sampling
ROUTED_BLOCKS = (1, 2)  # of four: where a way computes a part of the tokens, it does in the middle
NOTHING = "nothing"  # the subject of a place where nobody stands

AfterStep = Callable[[int, float], None]  # gets the step (from 1) and its loss


@dataclass(frozen=True)
class Way:
    """One of the ways to tune: its name, its loss, what the loss is given, and the share of the tokens that is computed."""

    key: str
    title: str
    config: MaskedLossConfig
    uses_mask: bool = True
    uses_prior: bool = False
    keep: float = 1.0


WAYS = (
    Way("no_mask", "no mask", MaskedLossConfig(), uses_mask=False),
    Way("mask", "mask", MaskedLossConfig()),
    Way("mask_min_weight", "mask + minimum weight", MaskedLossConfig(min_weight=0.1)),
    Way("mask_prior", "mask + prior", MaskedLossConfig(), uses_prior=True),
)


@dataclass(frozen=True)
class Examples:
    """What is trained on: names, latents float32 (N, 16, 1, h, w), captions float32 (N, P, 4, 32), one of which is drawn at each
    step, and masks float32 (N, 1, h, w) or None."""

    names: Sequence[str]
    latents: Tensor
    text: Tensor
    masks: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """One training batch: which examples, which of their captions, float32 noise (B, 16, 1, h, w) and times (B,) in (0, 1)."""

    index: Tensor
    caption: Tensor
    noise: Tensor
    time: Tensor


def captions_at(subjects: Sequence[str], places: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """Every subject at every place: float32 (subjects, places, 4, 32)."""
    return torch.stack([captions([(subject, place) for place in places], device) for subject in subjects])


def place_examples(side: int, device: torch.device) -> Examples:
    """The places, encoded at `side` pixels, each with the one caption that names it."""
    names, latents = [], []
    for name, rgb in shipped_places():
        names.append(name)
        latents.append(encode(cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA)))
    text = captions([(NOTHING, place) for place in names], device).unsqueeze(1)
    return Examples(names, torch.stack(latents).to(device), text)


def draws(examples: Examples, steps: int, seed: int) -> Iterator[Draw]:
    """The batches of a whole training, from the seed alone, so that every way of tuning gets the very same ones.

    Drawn on the CPU: a GPU's random numbers differ from model to model.
    """
    generator = torch.Generator().manual_seed(seed)
    shape, device = examples.latents.shape[1:], examples.latents.device
    count, choices = examples.text.shape[:2]
    for _ in range(steps):
        index = torch.randint(count, (BATCH,), generator=generator)
        caption = torch.randint(choices, (BATCH,), generator=generator)
        noise = torch.randn((BATCH, *shape), generator=generator)
        # One time from each of B parts of equal probability: every batch sees low and high noise, which halves the scatter.
        parts = torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)
        time = torch.sigmoid(TIME_SPREAD * torch.special.ndtri((parts / BATCH).clamp(1e-4, 1 - 1e-4)))
        yield Draw(index.to(device), caption.to(device), noise.to(device), time.to(device))


def noisy_latents(latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t for latents and noise (B, C, F, H, W) and times (B,)."""
    t = time.view(-1, 1, 1, 1, 1)
    return (1 - t) * latents + t * noise


def train_base(model: Model, places: Examples, steps: int, seed: int, backend: Backend, after_step: AfterStep) -> None:
    """Trains all of `model`, in place, on the places, without masks."""
    way = Way("base", "base model", MaskedLossConfig(), uses_mask=False)
    _train(model, places, way, steps, seed, BASE_LEARNING_RATE, backend, after_step)


def tune(
    model: Model, subjects: Examples, way: Way, steps: int, seed: int, backend: Backend, after_step: AfterStep
) -> None:
    """Trains the LoRA of `model`, in place, on the subjects in one way. The same seed gives every way the same noise, times and
    captions; the loss is all that differs."""
    _train(model, subjects, way, steps, seed, LORA_LEARNING_RATE, backend, after_step)


def _train(
    model: Model,
    examples: Examples,
    way: Way,
    steps: int,
    seed: int,
    learning_rate: float,
    backend: Backend,
    after_step: AfterStep,
) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    model.train()
    for step, draw in enumerate(draws(examples, steps, seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate_at(step, steps)
        loss = step_loss(model, examples, draw, way, seed, step, backend)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after_step(step + 1, loss.item())
    model.eval()


def rate_at(step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, against the highest."""
    return min((step + 1) / max(1.0, WARM_UP * steps), (1 - step / steps) * 1.25, 1.0)


def step_loss(
    model: Model, examples: Examples, draw: Draw, way: Way, seed: int, step: int, backend: Backend = "torch"
) -> Tensor:
    """The loss of one step: masked, held to the base model where the way has a prior, routed where it computes a part."""
    latents, text = examples.latents[draw.index], examples.text[draw.index, draw.caption]
    mask = examples.masks[draw.index].unsqueeze(2) if way.uses_mask and examples.masks is not None else None
    noisy = noisy_latents(latents, draw.noise, draw.time)
    prior = teacher(model, noisy, draw.time, text) if way.uses_prior else None
    target = FlowTarget(draw.noise, latents)
    if way.keep == 1:
        pred = predict(model, noisy, draw.time, text)
        return masked_loss(pred, target, mask, way.config, backend=backend, prior=prior)
    with routed(
        model, mask, way.keep, blocks=ROUTED_BLOCKS, config=way.config, has_prior=way.uses_prior, seed=seed, step=step
    ) as weights:
        pred = predict(model, noisy, draw.time, text)
    loss: Tensor = weights.loss(pred, target, prior=prior, backend=backend)
    return loss


@torch.no_grad()
def teacher(model: Model, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
    """What the base model predicts: the same network with its LoRA switched off, on the same noise and times."""
    model.disable_adapters()
    try:
        return predict(model, noisy, time, text)
    finally:
        model.enable_adapters()
