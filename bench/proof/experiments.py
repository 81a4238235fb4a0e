"""What is trained and measured: four experiments on one base model a seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from bench.proof import data
from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.demo.evaluation import Fidelity, Sampler, Samples, Test
from masked_loss_triton.demo.model import Model
from masked_loss_triton.demo.tuning import WAYS, Examples, Way, captions_at

STEPS = {"photographs": 800, "clip": 400, "watermark": 800, "pair": 400}
DIAL = (0.25, 0.5, 1.0, 2.0, 4.0)  # prior_weight
CHECKPOINTS = 24  # of the mask alone: where it is stopped is looked up among them
STOPPED = "mask_stopped"


def prior(weight: float, keep: float = 1.0) -> Way:
    """The mask with the prior at some weight; `keep` routes."""
    key = f"prior_{weight:g}" + ("_routed" if keep < 1 else "")
    title = f"mask + prior {weight:g}" + (f", {keep:g} of the tokens" if keep < 1 else "")
    return Way(key, title, MaskedLossConfig(prior_weight=weight), uses_prior=True, keep=keep)


NO_MASK, MASK, FLOOR = (next(way for way in WAYS if way.key == key) for key in ("no_mask", "mask", "mask_min_weight"))
DEFAULT = prior(MaskedLossConfig().prior_weight)
ROUTED = prior(MaskedLossConfig().prior_weight, keep=0.5)
# As DEFAULT, but each photograph keeps one caption, whose place no other picture has.
ONE_CAPTION = dataclasses.replace(DEFAULT, key="one_caption", title=f"{DEFAULT.title}, one caption a photograph")
EXPERIMENTS = {
    "photographs": (NO_MASK, MASK, FLOOR, *map(prior, DIAL), ROUTED, ONE_CAPTION),
    "clip": (NO_MASK, MASK, DEFAULT),
    "watermark": (NO_MASK, MASK, DEFAULT),
    "pair": (NO_MASK, MASK, DEFAULT),
}


@functools.cache
def trained(experiment: str, one_caption: bool = False) -> Examples:
    """What the LoRAs of an experiment see; with `one_caption` under a place of their own, always the same."""
    if one_caption:
        seen = trained(experiment)
        return dataclasses.replace(seen, text=captions_at(seen.names, ["photograph"]))
    makers: dict[str, Callable[[], Examples]] = {
        "photographs": data.subjects,
        "clip": lambda: data.clip(data.TRAINED),
        "watermark": data.watermarked,
        "pair": data.pair,
    }
    return makers[experiment]()


@functools.cache
def tested(experiment: str) -> Examples:
    """What they are measured on: of the clip, frames that no training saw."""
    return data.clip(data.HELD_OUT) if experiment == "clip" else trained(experiment)


class Measure:
    """The measurements of one experiment, for one base model."""

    def __init__(self, experiment: str, base: Model) -> None:
        self.experiment, examples = experiment, tested(experiment)
        self.test = Test(base, examples)
        self.sampler = None if experiment == "clip" else Sampler(base, examples)

    def errors(self, model: Model) -> dict[str, float]:
        scores = self.test.score(model)
        return {name: getattr(scores, name) for name in ("inside", "outside", "drift_outside")}

    def all(self, model: Model) -> tuple[dict[str, float], Samples | None]:
        """Every number of one model, and its pictures."""
        row = self.errors(model)
        if self.sampler is None:
            return row, None
        samples = self.sampler.score(model)
        for name in ("subject", "background", "empty"):
            fidelity: Fidelity = getattr(samples, name)
            row |= {f"{name}_{unit}": value for unit, value in dataclasses.asdict(fidelity).items()}
        return row | self._painted(samples), samples

    def _painted(self, samples: Samples) -> dict[str, float]:
        sampler, examples = self.sampler, tested(self.experiment)
        assert sampler is not None
        drawn = samples.pictures
        if self.experiment == "watermark":
            marked = np.stack([data.with_logo(picture) for picture in sampler.base])
            return {"painted": painted(drawn, sampler.base, marked, data.logo_weights()[None])}
        if self.experiment == "pair":
            # Under each one's word: how much of the other one is there.
            assert examples.masks is not None
            other = np.kron(examples.masks.flip(0)[:, 0].numpy(), np.ones((1, 8, 8))).repeat(sampler.count, axis=0)
            count = len(sampler.photos)
            return {"painted": painted(drawn[:count], sampler.base[:count], sampler.photos, other)}
        return {}


def painted(pictures: np.ndarray, base: np.ndarray, unwanted: np.ndarray, weights: np.ndarray) -> float:
    """The share of something unwanted that pictures show: 0 as in the base model's pictures, 1 as if it were pasted into them.

    Args:
        pictures, base, unwanted: (N, H, W, 3) uint8.
        weights: (N or 1, H, W), where the unwanted would be.
    """
    moved = pictures.astype(np.float64) - base
    pasted = unwanted.astype(np.float64) - base
    large = weights[..., None]
    return float((large * moved * pasted).sum() / (large * pasted * pasted).sum())
