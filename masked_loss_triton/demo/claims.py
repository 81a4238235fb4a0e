"""What the demo claims, checked on the numbers it measured. Nothing is rounded in favour of a claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from masked_loss_triton.demo.evaluate import Scores


@dataclass(frozen=True)
class Claim:
    """`key` is its name in report.json; `text` the sentence for people."""

    key: str
    text: str
    holds: bool


def check_claims(scores: Mapping[str, Scores]) -> list[Claim]:
    """The claims, for the scores of "base" and of the four ways by their keys."""
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
