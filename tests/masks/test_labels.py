"""Which pixel belongs to which label, and what labels weigh."""

import numpy as np
import pytest

from masked_loss_triton.masks.labels import complete_weights, parse_weights, split

EDGE = np.uint8([[234, 206, 165, 115, 68, 33, 13, 0]])


def test_a_plain_mask_round_a_label_keeps_the_edges_that_they_share():
    face, rest = split([EDGE, EDGE], plain=True)
    assert np.array_equal(face, EDGE)
    assert not rest.any()
    *_, rest = split([EDGE, np.full_like(EDGE, 255)], plain=True)
    assert np.array_equal(rest, 255 - EDGE)


def test_labels_side_by_side_share_a_pixel_of_their_border():
    face, body = split([EDGE, 255 - EDGE])
    assert np.array_equal(face + body, np.full_like(EDGE, 255))
    face, body = split([EDGE, np.full_like(EDGE, 255)])
    assert np.array_equal(face.astype(int) + body, np.full_like(EDGE, 255))


def test_weights_are_read_with_either_sign():
    assert parse_weights("face=1.5 body=0.7") == parse_weights("face:1.5,body:0.7") == {"face": 1.5, "body": 0.7}


def test_a_label_that_covers_nothing_is_no_measure():
    assert complete_weights({"face": 1, "logo": 3}, ["face", "logo"])["face"] == pytest.approx(1 / 3)
    assert complete_weights({"face": 1, "logo": 3}, ["face", "logo"], absent=["logo"])["face"] == 1
