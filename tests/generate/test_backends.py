"""Every detector and segmenter of the tables keeps its promises: a new one is tested by its line there."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.backends import (
    BY_WORDS,
    DETECTORS,
    SEGMENTERS,
    WHOLE,
    add_backend_arguments,
    load_backend,
)
from masked_loss_triton.generate.prompts import MaskRequest, Prompt
from tests.generate.conftest import LEFT, blue_picture, red_picture

REQUEST = MaskRequest(prompts=(Prompt("red"),))


def loaded(backend: str):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_backend_arguments(parser)
    try:
        return load_backend(backend, REQUEST, device="cpu", models=vars(parser.parse_args([])))
    except UserError as error:
        pytest.skip(f"{error}")  # its weights are not here; test_models.py has tiny ones


def test_every_flag_begins_with_the_name_of_a_module():
    """Else `load_backend` hands it to nobody: the name of its module."""
    parser = argparse.ArgumentParser(add_help=False)
    add_backend_arguments(parser)
    tables = (DETECTORS, SEGMENTERS, BY_WORDS, WHOLE)
    names = tuple(f"{entry.module}_" for table in tables for entry in table.values())
    assert [flag for flag in vars(parser.parse_args([])) if not flag.startswith(names)] == []


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_answers_for_every_picture_and_word_with_boxes_inside_the_picture(name):
    detector, _ = loaded(f"{name}+grabcut")
    pictures = [red_picture(), blue_picture()]
    found = detector.detect(pictures, ["red", "blue"])
    assert [len(words) for words in found] == [2, 2]
    for picture, words in zip(pictures, found, strict=True):
        for detection in (detection for word in words for detection in word):
            left, top, right, bottom = detection.box
            assert 0 <= left < right <= picture.shape[1]
            assert 0 <= top < bottom <= picture.shape[0]
            assert detection.score is None or 0 <= detection.score <= 1


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter_cuts_out_each_box_and_follows_it(name):
    _, segmenter = loaded(f"box+{name}")
    (cutouts, none) = segmenter.segment([red_picture(), blue_picture()], [[LEFT, LEFT], []])
    assert (len(cutouts), none) == (2, [])
    assert all(cutout.mask.shape == (48, 80) and cutout.mask.dtype == bool for cutout in cutouts)
    followed = list(segmenter.follow([red_picture()] * 3, [cutouts[0].mask]))
    assert [len(masks) for masks in followed] == [1, 1, 1]
    assert all(np.array(mask).dtype == bool and mask.shape == (48, 80) for (mask,) in followed)
