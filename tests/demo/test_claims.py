"""A claim holds when its numbers say so, and not otherwise."""

import dataclasses

import pytest
import torch

from masked_loss_triton.demo.evaluation import Scores, check_claims

SHOWN = {
    "base": Scores(1.7, 1.3, 0.0, 0.0, torch.zeros(1)),
    "no_mask": Scores(1.3, 0.9, 0.4, 0.4, torch.zeros(1)),
    "mask": Scores(1.2, 1.8, 0.5, 0.6, torch.zeros(1)),
    "mask_min_weight": Scores(1.2, 1.2, 0.5, 0.4, torch.zeros(1)),
    "mask_prior": Scores(1.25, 1.3, 0.3, 0.1, torch.zeros(1)),
}


def failed(**changes):
    scores = {key: dataclasses.replace(score, **changes.get(key, {})) for key, score in SHOWN.items()}
    return [claim.key for claim in check_claims(scores) if not claim.holds]


def test_all_claims_hold_where_the_numbers_say_so():
    assert failed() == []


def test_an_equal_inside_is_as_well_and_a_worse_one_is_not():
    assert failed(mask={"inside": 1.3}) == []
    assert failed(mask={"inside": 1.3000001}) == ["mask_learns_the_inside_as_well_or_better"]


@pytest.mark.parametrize("other", ["no_mask", "mask", "mask_min_weight"])
def test_the_prior_has_to_drift_least_of_all(other):
    assert failed(**{other: {"drift_outside": 0.1}}) == ["prior_drifts_least_outside"]


def test_a_way_that_did_not_learn_the_subject_is_reported():
    assert failed(mask_prior={"inside": 1.7}) == ["every_way_learns_the_subject"]


def test_a_run_that_diverged_shows_nothing():
    nan = float("nan")
    broken = {"inside": nan, "drift_outside": nan}
    assert len(failed(no_mask=broken, mask=broken, mask_min_weight=broken, mask_prior=broken)) == 3
