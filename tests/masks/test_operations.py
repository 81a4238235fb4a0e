"""Dilation and blur do what their units say, in their order, and the same for the same seed and name."""

from __future__ import annotations

import numpy as np
import pytest

from masked_loss_triton.masks.operations import MaskOperations, blur, dilate


@pytest.fixture
def dot():
    mask = np.zeros((101, 201), np.uint8)
    mask[50, 100] = 255
    return mask


def test_dilation_grows_by_a_disc_of_the_given_radius(dot):
    y, x = np.mgrid[:101, :201]
    distance = np.hypot(y - 50, x - 100)
    for radius in (1, 7):
        assert np.array_equal(dilate(dot, radius) == 255, distance <= radius)
    assert np.array_equal(dilate(dot, 0), dot)


def test_negative_dilation_shrinks_but_not_from_the_frame():
    mask = np.zeros((40, 40), np.uint8)
    mask[:, :20] = 255
    result = dilate(mask, -3)
    assert (result[:, :17] == 255).all()
    assert (result[:, 17:] == 0).all()


def test_blur_is_a_gaussian_of_a_fraction_of_the_smaller_side(dot):
    bright = dot.astype(np.uint8)
    bright[:, 100:] = 255
    result = blur(bright, 0.01)[50].astype(float) / 255
    sigma = 0.01 * 101
    from math import erf, sqrt

    edge = np.array([0.5 * (1 + erf((x - 99.5) / (sigma * sqrt(2)))) for x in range(201)])
    assert np.abs(result - edge).max() < 0.03
    assert np.array_equal(blur(bright, 0.0), bright)
    assert blur(np.full((1, 1), 9, np.uint8), 0.01) == 9


def test_dilation_comes_before_blur(dot):
    both = MaskOperations(mask_dilate=6, mask_blur=0.01).apply(dot, "x")
    assert np.array_equal(both, blur(dilate(dot, 6), 0.01))
    assert not np.array_equal(both, dilate(blur(dot, 0.01), 6))


def test_random_blur_depends_on_seed_and_name_alone():
    first = MaskOperations(mask_blur=0.01, mask_blur_random=True, mask_seed=3)
    names = [f"picture{i}" for i in range(200)]
    drawn = [first.blur_fraction(name) for name in names]
    assert drawn == [first.blur_fraction(name) for name in names]
    assert len(set(drawn)) == 200
    assert 0 <= min(drawn) < 0.001
    assert 0.009 < max(drawn) <= 0.01
    other = MaskOperations(mask_blur=0.01, mask_blur_random=True, mask_seed=4)
    assert other.blur_fraction("picture0") != drawn[0]
    assert MaskOperations(mask_blur=0.01).blur_fraction("picture0") == 0.01


def test_baking_follows_the_order_of_the_loss():
    import torch

    from masked_loss_triton import MaskedLossConfig, mask_weights

    weights = np.random.default_rng(0).random((2, 5, 7), dtype=np.float32)
    baked = MaskOperations(mask_bake_invert=True, mask_bake_gamma=0.6, mask_bake_min_weight=0.2).bake(weights)
    config = MaskedLossConfig(invert=True, gamma=0.6, min_weight=0.2)
    expected, _ = mask_weights(torch.from_numpy(weights)[None], config, shape=(1, 2, 5, 7))
    np.testing.assert_allclose(baked, expected[0].numpy(), atol=1e-6)
    assert np.array_equal(MaskOperations().bake(weights), weights)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_dilate": 1.5},
        {"mask_dilate": True},
        {"mask_blur": 0.051},
        {"mask_blur": -0.1},
        {"mask_blur": float("nan")},
        {"mask_time": "median"},
        {"mask_blur_random": 1},
        {"mask_bake_gamma": 0},
        {"mask_bake_min_weight": 1},
        {"mask_seed": -1},
    ],
)
def test_a_wrong_value_is_named(wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must be"):
        MaskOperations(**wrong)
