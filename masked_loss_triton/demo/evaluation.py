"""What a tuned model learned, measured on noise and times that no training saw, and what the demo claims of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from masked_loss_triton.demo.encoder import PATCH, decode
from masked_loss_triton.demo.model import Model, captions, predict, sample
from masked_loss_triton.demo.tuning import NOTHING, Examples, noisy_latents

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
NOISES = 2  # per photograph and time
EVALUATION_SEED = 90210  # one test for every run of the demo, whatever its --seed
SHOWN_PLACES = ("meadow", "dusk", "street", "stars")


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
    """The fixed test of one run: noise, times, one caption for each photograph, and the base model's answers."""

    __test__ = False  # not a pytest class, whatever its name

    def __init__(self, base: Model, subjects: Examples) -> None:
        assert subjects.masks is not None
        self.subjects = subjects
        self.masks = subjects.masks.unsqueeze(1)  # (N, 1, 1, h, w): against latents (N, C, 1, h, w)
        device = subjects.latents.device
        rows = torch.arange(len(subjects.names))
        self.text = subjects.text[rows, rows % subjects.text.shape[1]]
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


def _weighted_mean(values: Tensor, weights: Tensor) -> float:
    """The mean over all photographs in float64, weighted as in the loss: a photograph with more weight counts for more."""
    values, weights = values.double(), weights.double()
    return float((values * weights).sum() / weights.sum())


@dataclass(frozen=True)
class Fidelity:
    """How close pictures are to others where it counts, as PIE-Bench (arXiv 2310.01506) measures an edit's background: mean squared
    error of values in 0 to 1, its PSNR in decibels, and SSIM."""

    mse: float
    psnr: float
    ssim: float


@dataclass(frozen=True)
class Samples:
    """Pictures that one model draws from pure noise, and what they are worth.

    pictures: uint8 ((N + 1) * places, H, W, 3), every subject at every shown place, subject by subject, then nobody there.
    subject: the inside of the masks against the photographs.
    background: the outside of the masks against what the base model draws from the same noise under the same caption.
    empty: the places with nobody in them against the base model's.
    """

    pictures: np.ndarray
    subject: Fidelity
    background: Fidelity
    empty: Fidelity


class Sampler:
    """Draws the same pictures from every model: subjects at places where no photograph shows them, and the places alone."""

    def __init__(self, base: Model, subjects: Examples, places: Sequence[str] = SHOWN_PLACES) -> None:
        assert subjects.masks is not None
        device = subjects.latents.device
        pairs = [(name, place) for name in subjects.names for place in places] + [(NOTHING, place) for place in places]
        self.text, self.count = captions(pairs, device), len(places)
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        # One noise for each place: whoever stands there, the base model draws the same place.
        noise = torch.randn((len(places), *subjects.latents.shape[1:]), generator=generator).to(device)
        self.noise = noise.repeat(1 + len(subjects.names), 1, 1, 1, 1)
        self.photos = np.stack([decode(latents) for latents in subjects.latents]).repeat(self.count, axis=0)
        self.masks = subjects.masks[:, 0].cpu().numpy().repeat(self.count, axis=0)
        self.base = self._draw(base)

    def _draw(self, model: Model) -> np.ndarray:
        return np.stack([decode(latents) for latents in sample(model, self.noise, self.text)])

    def score(self, model: Model) -> Samples:
        """Draws one model's pictures and measures them."""
        return self.judge(self._draw(model))

    def judge(self, pictures: np.ndarray) -> Samples:
        """Measures pictures that `score` would draw."""
        subjects, places = np.split(pictures, [-self.count])
        base_subjects, base_places = np.split(self.base, [-self.count])
        return Samples(
            pictures,
            subject=fidelity(subjects, self.photos, self.masks),
            background=fidelity(subjects, base_subjects, 1 - self.masks),
            empty=fidelity(places, base_places, np.ones_like(self.masks[: self.count])),
        )


def fidelity(pictures: np.ndarray, others: np.ndarray, weights: np.ndarray) -> Fidelity:
    """Compares uint8 pictures (N, H, W, 3) with others, weighted with (N, H/8, W/8); PSNR is of the mean error."""
    from skimage.metrics import structural_similarity

    large = np.kron(weights.astype(np.float64), np.ones((1, PATCH, PATCH)))
    error = ((pictures.astype(np.float64) - others) / 255) ** 2
    maps = [
        structural_similarity(one, other, channel_axis=2, full=True)[1].mean(axis=2)
        for one, other in zip(pictures, others, strict=True)
    ]
    mse = float((error.mean(axis=3) * large).sum() / large.sum())
    ssim = float((np.stack(maps) * large).sum() / large.sum())
    # Equal pictures have no error: their PSNR is infinite, which JSON cannot hold.
    return Fidelity(mse, float(-10 * np.log10(max(mse, 1e-10))), ssim)


@dataclass(frozen=True)
class Claim:
    """Something that the demo claims to show: `key` is its name in report.json, `text` the sentence for people."""

    key: str
    text: str
    holds: bool


def check_claims(scores: Mapping[str, Scores], samples: Mapping[str, Samples]) -> list[Claim]:
    """The claims, for the measurements of "base" and of the four ways by their keys. Nothing is rounded in favour of a claim."""
    base, mask, prior = scores["base"], scores["mask"], scores["mask_prior"]
    ways = [score for key, score in scores.items() if key != "base"]
    others = [key for key in scores if key not in ("base", "mask_prior")]
    drawn = samples["mask_prior"]
    return [
        Claim(
            "every_way_learns_the_subject",
            "Every way of tuning lowers the error inside the mask, against the base model.",
            max(way.inside for way in ways) < base.inside,
        ),
        Claim(
            "mask_leaves_the_background_unlearned",
            "With the mask the background of the photographs is left unlearned: its error outside is larger than without a mask.",
            mask.outside > scores["no_mask"].outside,
        ),
        Claim(
            "prior_drifts_least_outside",
            "With the prior the outside drifts least from the base model, of all four ways.",
            prior.drift_outside < min(scores[key].drift_outside for key in others),
        ),
        Claim(
            "prior_keeps_the_place_of_the_prompt",
            "In pictures drawn from noise, the subject stands at the place that the prompt names: with the prior the background is "
            "closest to what the base model draws there, of all four ways.",
            drawn.background.psnr > max(samples[key].background.psnr for key in others),
        ),
        Claim(
            "prior_spares_prompts_without_the_subject",
            "Prompts without the subject change least with the prior, of all four ways.",
            drawn.empty.psnr > max(samples[key].empty.psnr for key in others),
        ),
    ]
