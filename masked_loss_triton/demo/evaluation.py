"""What a tuned model learned, measured on noise and times that no training saw, and what the demo claims of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from masked_loss_triton.demo.model import Model, captions, predict
from masked_loss_triton.demo.tuning import Examples, noisy_latents

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
NOISES = 2  # per photograph and time
EVALUATION_SEED = 90210  # one test for every run of the demo, whatever its --seed
SHOWN_TIME = (
    0.7  # the noise level of the pictures in the report: the photograph is there, under 2.3 times as much noise
)


@dataclass(frozen=True)
class Scores:
    """Mean squared errors over every photograph, time and noise of the test; latents have about unit variance.

    inside, outside: error of the predicted velocity, weighted with the mask m and with 1 - m.
    drift_inside, drift_outside: squared distance from the base model's prediction, weighted in the same ways.
    drift_map: (N, h, w) on the CPU, the distance at each latent position, averaged over channels, times and noises.
    """

    inside: float
    outside: float
    drift_inside: float
    drift_outside: float
    drift_map: Tensor


class Test:
    """The fixed test of one run: the noise, the times and the base model's answers to them."""

    __test__ = False  # not a pytest class, whatever its name

    def __init__(self, base: Model, subjects: Examples) -> None:
        assert subjects.masks is not None
        self.subjects = subjects
        self.masks = subjects.masks.unsqueeze(1)  # (N, 1, 1, h, w): against latents (N, C, 1, h, w)
        device = subjects.latents.device
        self.text = captions(subjects.names, device)
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        shape = subjects.latents.shape
        self.noises = [torch.randn(shape, generator=generator).to(device) for _ in range(NOISES)]
        self.base_answers = [answer for _, answer in self._answers(base)]

    def _answers(self, model: Model) -> Iterator[tuple[Tensor, Tensor]]:
        """Each noise and time: the noise and the model's prediction for all N photographs."""
        for noise in self.noises:
            for time in TIMES:
                yield noise, self.predict_at(model, noise, time)

    @torch.no_grad()
    def predict_at(self, model: Model, noise: Tensor, time: float) -> Tensor:
        times = torch.full((len(noise),), time, device=noise.device)
        return predict(model, noisy_latents(self.subjects.latents, noise, times), times, self.text)

    def score(self, model: Model) -> Scores:
        """Measures one model."""
        latents = self.subjects.latents
        error, drift = torch.zeros_like(latents[:, 0, 0]), torch.zeros_like(latents[:, 0, 0])
        for (noise, answer), base_answer in zip(self._answers(model), self.base_answers, strict=True):
            error += (answer - (noise - latents)).square().mean(dim=(1, 2))
            drift += (answer - base_answer).square().mean(dim=(1, 2))
        error, drift = error / len(self.base_answers), drift / len(self.base_answers)
        inside = self.masks[:, 0, 0]
        return Scores(
            inside=_weighted_mean(error, inside),
            outside=_weighted_mean(error, 1 - inside),
            drift_inside=_weighted_mean(drift, inside),
            drift_outside=_weighted_mean(drift, 1 - inside),
            drift_map=drift.cpu(),
        )

    def pictures(self, model: Model) -> Tensor:
        """One-step predictions of the clean latents from noise level SHOWN_TIME, x_0 = x_t - t v: (N, 16, 1, h, w)."""
        noise = self.noises[0]
        times = torch.full((len(noise),), SHOWN_TIME, device=noise.device)
        noisy = noisy_latents(self.subjects.latents, noise, times)
        return noisy - SHOWN_TIME * self.predict_at(model, noise, SHOWN_TIME)


def _weighted_mean(values: Tensor, weights: Tensor) -> float:
    """The mean over all photographs in float64, weighted as in the loss: a photograph with more weight counts for more."""
    values, weights = values.double(), weights.double()
    return float((values * weights).sum() / weights.sum())


@dataclass(frozen=True)
class Claim:
    """Something that the demo claims to show: `key` is its name in report.json, `text` the sentence for people."""

    key: str
    text: str
    holds: bool


def check_claims(scores: Mapping[str, Scores]) -> list[Claim]:
    """The claims, for the scores of "base" and of the four ways by their keys. Nothing is rounded in favour of a claim."""
    base, plain, mask = scores["base"], scores["no_mask"], scores["mask"]
    floor, prior = scores["mask_min_weight"], scores["mask_prior"]
    least_of_others = min(plain.drift_outside, mask.drift_outside, floor.drift_outside)
    return [
        Claim(
            "every_way_learns_the_subject",
            "Every way of tuning lowers the error inside the mask.",
            max(way.inside for way in (plain, mask, floor, prior)) < base.inside,
        ),
        Claim(
            "mask_learns_the_inside_as_well_or_better",
            "With the mask the inside is learned as well as or better than without.",
            mask.inside <= plain.inside,
        ),
        Claim(
            "prior_drifts_least_outside",
            "With the prior the outside drifts least from the base model.",
            prior.drift_outside < least_of_others,
        ),
    ]
