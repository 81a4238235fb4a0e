"""A config is checked when it is built, and says what was wrong."""

import dataclasses
import json

import numpy as np
import pytest

from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.config import PRESETS


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("gamma", 0, ValueError),
        ("gamma", -1.0, ValueError),
        ("gamma", float("nan"), ValueError),
        ("gamma", float("inf"), ValueError),
        ("gamma", "1", TypeError),
        ("gamma", True, TypeError),
        ("min_weight", 1.0, ValueError),
        ("min_weight", -0.1, ValueError),
        ("binarize", 1.0, ValueError),
        ("binarize", -0.5, ValueError),
        ("prior_threshold", 1.5, ValueError),
        ("prior_weight", -1, ValueError),
        ("prior_weight", None, TypeError),
        ("prior_weight", "half", TypeError),
        ("area_scale_beta", -0.1, ValueError),
        ("loss_delta", 0.0, ValueError),
        ("eps", 0.0, ValueError),
        ("blur_kernel_size", 4, ValueError),
        ("blur_kernel_size", -3, ValueError),
        ("blur_kernel_size", 1_000_001, ValueError),  # it would never end
        ("blur_kernel_size", 3.0, TypeError),
        ("invert", 1, TypeError),
        ("per_sample", "yes", TypeError),
        ("resample", "lanczos", ValueError),
        ("floor", "max", ValueError),
        ("normalization", "sum", ValueError),
        ("loss_type", "l2", ValueError),
    ],
)
def test_a_bad_value_is_named_with_what_is_accepted(field, value, error):
    with pytest.raises(error, match=rf"{field} must be .*got {value!r}".replace("(", r"\(")):
        MaskedLossConfig(**{field: value})


def test_prior_weights_per_sample_need_per_sample():
    with pytest.raises(ValueError, match="per_sample=True"):
        MaskedLossConfig(prior_weight=[0.1, 0.2])
    assert MaskedLossConfig(prior_weight=[0.1, 2], per_sample=True).prior_weight == (0.1, 2.0)


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError, match="mask_gamma"):
        MaskedLossConfig(mask_gamma=2.0)


def test_a_config_is_frozen_hashable_and_survives_json():
    config = MaskedLossConfig(gamma=0.7, min_weight=0.05, prior_weight=(0.1, 0.2), per_sample=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.gamma = 2.0
    assert MaskedLossConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert MaskedLossConfig(**json.loads(config.to_text())) == config
    assert len({config, config.replace(gamma=0.7), config.replace(gamma=0.8)}) == 2


def test_numbers_of_numpy_are_numbers():
    assert MaskedLossConfig(gamma=np.float32(0.5), min_weight=np.float64(0.25)).to_dict()["gamma"] == 0.5


def test_a_change_is_checked_again():
    with pytest.raises(ValueError, match="gamma"):
        MaskedLossConfig().replace(gamma=0)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_takes_changes(name):
    assert MaskedLossConfig.preset(name, min_weight=0.3).min_weight == 0.3


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match=r"ai-toolkit.*blissful.*got 'kohya'"):
        MaskedLossConfig.preset("kohya")
