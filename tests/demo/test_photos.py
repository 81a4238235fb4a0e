"""The shipped photographs are on the disk, and GrabCut finds their subjects, the same ones every time."""

import socket

import numpy as np
import pytest

from masked_loss_triton.demo import photos
from masked_loss_triton.demo.photos import Photo, find_subject, shipped_photos, world_pictures


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the demo opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_every_photograph_is_found_without_a_network(no_network):
    assert [photo.name for photo in shipped_photos()] == list(photos.SUBJECTS)
    assert len(world_pictures()) == len(photos.WORLD)


def test_subjects_are_square_colour_pictures():
    for photo in shipped_photos():
        height, width, colours = photo.rgb.shape
        assert height == width >= 300, photo.name
        assert colours == 3
        assert photo.rgb.dtype == np.uint8


def test_no_subject_is_in_the_world():
    shipped = {shipped.path.rsplit("/", 1)[-1] for shipped in photos.SUBJECTS.values()}
    assert not shipped & set(photos.WORLD)


@pytest.mark.parametrize("photo", shipped_photos(), ids=lambda photo: photo.name)
def test_grabcut_finds_a_subject_inside_its_rectangle(photo):
    mask = find_subject(photo)
    assert mask.shape == photo.rgb.shape[:2]
    assert mask.dtype == np.float32
    assert mask.min() >= 0
    assert mask.max() <= 1
    left, top, right, bottom = photo.box
    assert mask[top:bottom, left:right].mean() > 0.4
    outside = mask.copy()
    # Ten pixels: the mask is found on a smaller copy, closed and blurred.
    outside[max(top - 10, 0) : bottom + 10, max(left - 10, 0) : right + 10] = 0
    assert outside.max() == 0


def test_grabcut_finds_the_same_mask_again():
    photo = shipped_photos()[0]
    assert np.array_equal(find_subject(photo), find_subject(photo))


def test_an_unknown_photograph_is_searched_from_its_centre():
    rgb = np.full((120, 160, 3), (40, 90, 160), np.uint8)
    rgb[30:90, 50:110] = (220, 120, 30)
    rgb += np.random.default_rng(0).integers(0, 8, rgb.shape, dtype=np.uint8)
    mask = find_subject(Photo("square", rgb))
    assert mask[40:80, 60:100].min() > 0.9
    assert mask[:20].max() < 0.1


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 3), (7, 7)])
def test_a_picture_too_small_for_grabcut_gives_some_mask(size):
    mask = find_subject(Photo("tiny", np.zeros((*size, 3), np.uint8)))
    assert mask.shape == size
