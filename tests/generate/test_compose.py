"""What is done to instances and masks, exactly, on known inputs."""

from __future__ import annotations

import numpy as np
import pytest

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.compose import Instance, choose, compose
from masked_loss_triton.generate.prompts import MaskRequest, Prompt, parse_prompt, parse_prompts

SHAPE = (20, 30)


def area(left, top, right, bottom) -> np.ndarray:
    mask = np.zeros(SHAPE, bool)
    mask[top:bottom, left:right] = True
    return mask


def instance(left, top, right, bottom, score=0.5, mask_score=0.5) -> Instance:
    return Instance(area(left, top, right, bottom), (left, top, right, bottom), score, mask_score)


def options(*prompts, **changes) -> MaskRequest:
    return MaskRequest(prompts=tuple(map(parse_prompt, prompts or ("a",))), **changes)


def test_layers_have_their_grey_and_the_highest_wins():
    found = {"face": [area(10, 2, 14, 6)], "body": [area(8, 2, 16, 18)], "hair": [area(9, 0, 15, 4)]}
    grey = compose(found, options("face=1.0", "body=0.5", "hair=0.3"), SHAPE)
    expected = np.zeros(SHAPE, np.uint8)
    for y in range(20):
        for x in range(30):
            for name, value in (("hair", 76), ("body", 128), ("face", 255)):
                if found[name][0][y, x]:
                    expected[y, x] = value
    assert np.array_equal(grey, expected)
    assert grey.dtype == np.uint8


def test_the_instances_of_a_prompt_are_united():
    grey = compose({"a": [area(0, 0, 3, 3), area(2, 2, 5, 5), area(20, 10, 22, 12)]}, options(), SHAPE)
    expected = (area(0, 0, 3, 3) | area(2, 2, 5, 5) | area(20, 10, 22, 12)) * np.uint8(255)
    assert np.array_equal(grey, expected)


def test_excluded_words_are_black_after_padding_and_before_the_blur():
    found = {"a": [area(10, 5, 20, 15)], "hand": [area(0, 0, 12, 20)]}
    grey = compose(found, options("a", exclude=("hand",), mask_dilate=3), SHAPE)
    assert (grey[:, :12] == 0).all()
    assert grey[10, 22] == 255
    assert grey[10, 23] == 0
    blurred = compose(found, options("a", exclude=("hand",), mask_blur=0.05), SHAPE)
    assert 0 < blurred[10, 11] < 255


def test_padding_grows_by_a_disc_and_shrinks():
    found = {"a": [area(10, 10, 11, 11)]}
    grown = compose(found, options("a=0.5", mask_dilate=4), SHAPE)
    y, x = np.mgrid[0:20, 0:30]
    assert np.array_equal(grown, np.where((y - 10) ** 2 + (x - 10) ** 2 <= 16, 128, 0))
    shrunk = compose({"a": [area(5, 5, 15, 15)]}, options("a", mask_dilate=-2), SHAPE)
    assert shrunk[7:13, 7:13].min() == 255
    assert (shrunk > 0).sum() == 36


def test_the_blur_is_a_gaussian_of_a_fraction_of_the_smaller_side():
    shape = (200, 300)
    mask = np.zeros(shape, bool)
    mask[:, 150:] = True
    row = compose({"a": [mask]}, options(mask_blur=0.02), shape)[100].astype(float) / 255
    spread = np.diff(row)
    centre = (spread * np.arange(299)).sum() / spread.sum()
    assert np.sqrt((spread * (np.arange(299) - centre) ** 2).sum()) == pytest.approx(4, rel=0.03)


def test_inversion_comes_last():
    found = {"a": [area(5, 5, 15, 15)], "b": [area(0, 0, 7, 20)]}
    straight = compose(found, options("a=0.4", exclude=("b",), mask_dilate=1, mask_blur=0.03), SHAPE)
    inverted = compose(found, options("a=0.4", exclude=("b",), mask_dilate=1, mask_blur=0.03, invert=True), SHAPE)
    assert np.array_equal(inverted, 255 - straight)
    assert (compose({}, options(invert=True), SHAPE) == 255).all()


def test_largest_goes_by_the_mask_and_nearest_by_the_centre_of_the_box():
    small, large, corner = instance(1, 1, 5, 5), instance(18, 8, 28, 18), instance(0, 15, 4, 20)
    three = [small, large, corner]
    assert choose(three, options(), "all") == three
    assert choose(three, options(), "largest") == [large]
    assert choose(three, options(reference_box=(0, 0, 0.2, 0.3)), "nearest") == [small]
    assert choose(three, options(reference_box=(0, 0.7, 0.2, 1)), "nearest") == [corner]
    # In fractions of the sides: 10 of 30 columns are nearer than 8 of 20 rows.
    right, below = instance(14, 4, 16, 6), instance(4, 12, 6, 14)
    assert choose([below, right], options(reference_box=(0.1, 0.2, 0.2333, 0.3)), "nearest") == [right]


def test_poor_small_and_empty_instances_do_not_count():
    poor, small, good = instance(0, 0, 9, 9, mask_score=0.3), instance(0, 0, 2, 2), instance(0, 0, 10, 12)
    empty = instance(0, 0, 0, 0)
    assert choose([poor, small, good, empty], options(min_mask_score=0.4, min_size=0.01), "all") == [good]
    assert choose([instance(0, 0, 6, 10)], options(min_size=0.1), "all") != []  # just the size that is asked for
    assert choose([empty], options(), "largest") == []


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("person", Prompt("person", 1.0)),
        ("face=0.5", Prompt("face", 0.5)),
        ("  a  red   car = .25", Prompt("a red car", 0.25)),
        ("x=y=0.5", Prompt("x=y", 0.5)),
    ],
)
def test_prompts_are_words_and_a_weight(text, prompt):
    assert parse_prompt(text) == prompt


@pytest.mark.parametrize(
    "text", ["", "=0.5", "face=", "face=white", "face=0", "face=1.5", "face=nan", "a<loc_1>", "face=-1"]
)
def test_bad_prompts_are_one_line(text):
    with pytest.raises(UserError, match="prompt") as caught:
        parse_prompt(text)
    assert caught.value.exit_status == 2


def test_even_the_smallest_weight_is_not_black():
    assert [Prompt("a", weight).grey for weight in (1e-6, 0.3, 0.5, 1)] == [1, 76, 128, 255]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"min_score": 1.5}, "--min_score must be between 0 and 1, got 1.5"),
        ({"min_size": float("nan")}, "--min_size"),
        ({"mask_blur": 0.2}, "--mask_blur must be between 0 and 0.05"),
        ({"mask_dilate": 5000}, "--mask_dilate"),
        ({"reference_box": (0.5, 0, 0.4, 1)}, "--reference_box"),
        ({"exclude": ("a",)}, "prompt 'a' is given twice"),
    ],
)
def test_bad_options_are_one_line(changes, text):
    with pytest.raises(UserError, match=text):
        options("a", **changes)


def test_what_is_excluded_has_no_weight():
    assert parse_prompts(["a=0.5"], ["b"]) == ((Prompt("a", 0.5),), ("b",))
    with pytest.raises(UserError, match="has no weight"):
        parse_prompts(["a"], ["b=0.5"])
