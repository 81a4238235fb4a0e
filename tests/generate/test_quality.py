"""Marks of masks that deserve a look: bad masks of real photographs have them, good ones have none."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.generate.mask_files import read_note
from masked_loss_triton.generate.quality import clip_marks, on_edges, picture_marks
from tests.generate.support import generate, subject, write_clip
from tests.generate.test_grabcut import hand_made, photograph
from tests.generate.test_saliency import weights

__all__ = ["weights"]  # a fixture


@pytest.mark.parametrize("name", ["coffee", "flower", "astronaut", "rocket"])
def test_a_mask_that_was_drawn_by_hand_has_no_marks(name):
    picture = photograph(name)
    assert picture_marks(picture, hand_made(name, picture.shape[:2]), scores=[0.9]) == []


def test_each_mark_has_its_reason():
    picture, mask = subject(0)
    nothing = np.zeros_like(mask)
    nothing[0, 0] = True
    assert picture_marks(picture, nothing) == ["it covers 0.0% of the picture"]
    assert picture_marks(picture, ~nothing) == ["it covers 100.0% of the picture"]
    assert picture_marks(picture, mask, scores=[0.9, 0.31]) == ["a score of 0.31"]
    assert picture_marks(picture, mask, salience=np.roll(mask, 20, axis=1))[0].startswith("it is not what stands out")
    assert picture_marks(picture, mask, salience=mask) == []


def test_a_box_that_was_not_cut_is_told_and_one_that_was_is_not():
    picture, mask = subject(0)
    box = np.zeros_like(mask)
    box[5:60, 8:88] = True
    assert "it reaches all four sides of its box: nothing was cut out" in picture_marks(picture, box, [(8, 5, 88, 60)])
    assert not any("sides" in mark for mark in picture_marks(picture, mask, [(8, 5, 88, 60)]))


def test_an_outline_is_compared_with_the_edges_of_the_picture():
    picture, mask = subject(0)
    assert on_edges(picture, mask) > 0.95
    assert on_edges(picture, np.roll(mask, 25, axis=1)) < 0.8
    assert on_edges(picture, np.zeros_like(mask)) == 1


def test_a_clip_that_jumps_or_has_gaps_is_told():
    masks = [np.roll(subject(0)[1], number, axis=1) for number in range(6)]
    assert clip_marks(masks) == []
    assert clip_marks([]) == []
    jumping = [*masks[:3], np.roll(masks[3], 30, axis=1), *masks[4:]]
    (mark,) = clip_marks(jumping)
    assert mark.startswith("it jumps at frame 3 (IoU 0.")
    assert clip_marks([*masks, np.zeros_like(masks[0])]) == ["it is gone in 1 of 7 frames"]


@pytest.fixture
def folder(tmp_path):
    """Nine good pictures, one without anything in it, and a clip that jumps."""
    (tmp_path / "in").mkdir()
    for seed in range(9):
        Image.fromarray(subject(seed)[0]).save(tmp_path / "in" / f"good{seed}.png")
    noise = np.random.default_rng(0).integers(90, 110, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "in" / "none.png")
    picture = subject(0, (160, 96))[0]
    write_clip(tmp_path / "in" / "jump.mp4", [picture, picture, np.roll(picture, 60, axis=1)])
    return tmp_path


def test_the_command_tells_of_them_the_sheet_has_the_worst_first_and_strict_refuses(folder, capsys):
    flags = ("--sheet_limit", "2", "--sheet", folder / "look")
    for again in (False, True):  # read from the files the second time
        assert generate(folder, *flags) == 0
        said = capsys.readouterr().out
        assert f"Look at {folder / 'in' / 'none.png'}: " in said, again
        assert f"Look at {folder / 'in' / 'jump.mp4'}: it jumps at frame 2" in said
        assert "good" not in said
        page = (folder / "look.html").read_text()
        assert "none.png" in page
        assert "jump.mp4" in page
    assert generate(folder, "--strict") == 1
    assert read_note(folder / "out" / "good0.png")["marks"] == []


@pytest.mark.slow
def test_a_mask_is_compared_with_what_stands_out(weights, tmp_path, capsys):
    """GrabCut's central box on the rocket: half of the sky."""
    (tmp_path / "in").mkdir()
    for name in ("rocket", "flower"):
        Image.fromarray(photograph(name)).save(tmp_path / "in" / f"{name}.png")
    assert generate(tmp_path, "--compare") == 0
    said = capsys.readouterr().out
    assert "rocket.png: " in said
    assert "it is not what stands out (IoU 0.0" in said
    assert "flower.png" not in said
