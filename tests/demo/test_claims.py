"""A claim holds when its numbers say so, and not otherwise."""

import dataclasses

import numpy as np
import pytest
import torch

from masked_loss_triton.demo.evaluation import Fidelity, Samples, Scores, check_claims

SHOWN = {
    "base": Scores(1.7, 1.3, 0.0, 0.0, torch.zeros(1)),
    "no_mask": Scores(1.3, 0.9, 0.4, 0.4, torch.zeros(1)),
    "mask": Scores(1.2, 1.8, 0.5, 0.6, torch.zeros(1)),
    "mask_min_weight": Scores(1.2, 1.2, 0.5, 0.4, torch.zeros(1)),
    "mask_prior": Scores(1.25, 1.3, 0.3, 0.1, torch.zeros(1)),
}
# PSNR of the background, and of places with nobody in them.
DRAWN = {
    "base": (100.0, 100.0),
    "no_mask": (8.0, 10.0),
    "mask": (9.0, 9.0),
    "mask_min_weight": (8.0, 9.0),
    "mask_prior": (18.0, 16.0),
}


def samples(background, empty):
    nobody = np.zeros((0, 8, 8, 3), np.uint8)
    one, two, three = (Fidelity(10 ** (-psnr / 10), psnr, 0.5) for psnr in (14.0, background, empty))
    return Samples(nobody, one, two, three)


def failed(drawn=None, **changes):
    scores = {key: dataclasses.replace(score, **changes.get(key, {})) for key, score in SHOWN.items()}
    pictures = {key: samples(*psnrs) for key, psnrs in (DRAWN | (drawn or {})).items()}
    return [claim.key for claim in check_claims(scores, pictures) if not claim.holds]


def test_all_claims_hold_where_the_numbers_say_so():
    assert failed() == []


def test_a_mask_that_learned_the_background_is_reported():
    assert failed(mask={"outside": 0.9}) == ["mask_leaves_the_background_unlearned"]


@pytest.mark.parametrize("other", ["no_mask", "mask", "mask_min_weight"])
def test_the_prior_has_to_drift_least_of_all(other):
    assert failed(**{other: {"drift_outside": 0.1}}) == ["prior_drifts_least_outside"]


@pytest.mark.parametrize("other", ["no_mask", "mask", "mask_min_weight"])
def test_the_pictures_under_the_prior_have_to_be_closest_to_the_base_model_of_all(other):
    assert failed({other: (18.0, 9.0)}) == ["prior_keeps_the_place_of_the_prompt"]
    assert failed({other: (9.0, 16.0)}) == ["prior_spares_prompts_without_the_subject"]


def test_a_way_that_did_not_learn_the_subject_is_reported():
    assert failed(mask_prior={"inside": 1.7}) == ["every_way_learns_the_subject"]


def test_a_run_that_diverged_shows_nothing():
    nan = float("nan")
    broken = {"inside": nan, "outside": nan, "drift_outside": nan}
    drawn = {key: (nan, nan) for key in DRAWN}
    assert len(failed(drawn, no_mask=broken, mask=broken, mask_min_weight=broken, mask_prior=broken)) == 5
