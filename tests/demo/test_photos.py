"""The shipped photographs are on the disk, and a folder of the user's is read with all its oddities."""

import socket

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.demo import photos
from masked_loss_triton.demo.photos import read_folder, shipped_photos, shipped_places
from masked_loss_triton.errors import UserError
from tests.demo.support import half_mask, noise


@pytest.fixture
def warnings():
    return []


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the demo opened a network connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_every_photograph_is_found_without_a_network(no_network):
    assert [photo.name for photo in shipped_photos()] == list(photos.SUBJECTS)
    assert [name for name, _ in shipped_places()] == list(photos.PLACES)


def test_subjects_and_places_are_square_colour_pictures():
    for name, rgb in [(photo.name, photo.rgb) for photo in shipped_photos()] + shipped_places():
        height, width, colours = rgb.shape
        assert height == width >= 250, name
        assert colours == 3
        assert rgb.dtype == np.uint8
        assert rgb.std() > 10, name


def test_no_subject_stands_at_a_place():
    files = {shipped.path for shipped in photos.SUBJECTS.values()}
    assert not files & {place.path for place in photos.PLACES.values()}


def test_a_folder_gives_alpha_first_then_the_mask_beside_then_none(tmp_path, warnings):
    alpha = half_mask(40, 40)
    Image.fromarray(np.dstack([noise(40, 40), alpha])).save(tmp_path / "a_alpha.png")
    Image.fromarray(noise(40, 40)).save(tmp_path / "b_beside.jpg")
    Image.fromarray(np.kron(alpha, np.ones((2, 2), np.uint8))).save(tmp_path / "b_beside_mask.png")
    Image.fromarray(np.dstack([noise(40, 40), np.full((40, 40), 255, np.uint8)])).save(tmp_path / "c_opaque.png")
    Image.fromarray(noise(40, 40)).save(tmp_path / "gas_mask.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    found = {photo.name: photo for photo in read_folder(tmp_path, warnings.append)}
    assert list(found) == ["a_alpha", "b_beside", "c_opaque", "gas_mask"]
    np.testing.assert_array_equal(found["a_alpha"].mask, half_mask(40, 40))
    np.testing.assert_array_equal(found["b_beside"].mask, half_mask(40, 40))
    assert found["c_opaque"].mask is None
    assert found["gas_mask"].mask is None
    assert not warnings


def test_a_broken_file_is_named_in_one_line_and_skipped(tmp_path, warnings):
    Image.fromarray(noise(40, 40)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "empty.jpg").touch()
    assert [photo.name for photo in read_folder(tmp_path, warnings.append)] == ["good"]
    assert len(warnings) == 2
    for warning, name in zip(warnings, ("broken.png", "empty.jpg"), strict=True):
        assert name in warning
        assert "\n" not in warning


def test_two_files_of_one_stem_get_two_names(tmp_path, warnings):
    for name in ("cat.jpg", "cat.png"):
        Image.fromarray(noise(40, 40)).save(tmp_path / name)
    assert [photo.name for photo in read_folder(tmp_path, warnings.append)] == ["cat", "cat_2"]


def test_names_that_are_long_or_not_text_are_made_usable(tmp_path, warnings):
    for name in ("x" * 200 + ".png", "bad\udcff.png"):
        Image.fromarray(noise(40, 40)).save(tmp_path / name)
    names = [photo.name for photo in read_folder(tmp_path, warnings.append)]
    assert names == ["bad?", "x" * 80]


def test_a_folder_of_many_photographs_is_cut_short_and_says_so(tmp_path, warnings):
    for i in range(15):
        Image.fromarray(noise(16, 16)).save(tmp_path / f"{i:02}.png")
    assert len(read_folder(tmp_path, warnings.append)) == 12
    assert "first 12" in warnings[0]


def test_a_folder_without_a_usable_photograph_is_an_error(tmp_path, warnings):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no photograph in it can be used"):
        read_folder(tmp_path, warnings.append)


def test_a_mask_of_another_shape_than_its_photograph_is_named_and_skipped(tmp_path, warnings):
    Image.fromarray(noise(40, 40)).save(tmp_path / "a.png")
    Image.fromarray(half_mask(40, 60)).save(tmp_path / "a_mask.png")
    Image.fromarray(noise(40, 40)).save(tmp_path / "b.png")
    assert [photo.name for photo in read_folder(tmp_path, warnings.append)] == ["b"]
    assert "a_mask.png is 60x40 but its picture was 40x40" in warnings[0]
