"""Masks that are computed: where the pictures of an edit pair differ, and what never changes over a folder or a clip."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.cli import main
from masked_loss_triton.demo.photos import shipped_photos
from masked_loss_triton.generate.difference import differing
from masked_loss_triton.generate.static import Spread
from masked_loss_triton.masks.frames import read_frames
from tests.generate.support import contents, write_clip
from tests.generate.test_grabcut import iou

SIDE = 256
# Beside the demo's photographs, pictures that scikit-image ships.
OTHERS = (
    *("brick.png", "camera.png", "chelsea.png", "coins.png", "color.png", "grass.png", "gravel.png"),
    *(
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "retina.jpg",
        "rocket.jpg",
    ),
)


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    skimage = pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    folder = Path(skimage.__file__).parent / "data"
    return [photo.rgb for photo in shipped_photos()] + [cv2.imread(str(folder / name)) for name in OTHERS]


def jpeg(picture: np.ndarray, quality: int = 90) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def crop(rng, photographs, side: int = SIDE) -> np.ndarray:
    """A square out of one of the photographs."""
    picture = photographs[rng.integers(len(photographs))]
    size = int(rng.uniform(0.5, 1) * min(picture.shape[:2]))
    top, left = (rng.integers(0, length - size + 1) for length in picture.shape[:2])
    return cv2.resize(picture[top : top + size, left : left + size], (side, side), interpolation=cv2.INTER_AREA)


def shape(rng) -> np.ndarray:
    """An ellipse, rectangle or polygon."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    x, y = (int(value) for value in rng.integers(SIDE // 4, 3 * SIDE // 4, 2))
    across, down = (int(value) for value in rng.integers(SIDE // 10, SIDE // 3, 2))
    kind = rng.integers(3)
    if kind == 0:
        cv2.ellipse(mask, (x, y), (across, down), float(rng.uniform(0, 180)), 0, 360, 1, -1)
    elif kind == 1:
        cv2.rectangle(mask, (x - across, y - down), (x + across, y + down), 1, -1)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        corners = np.stack([x + across * np.cos(angles), y + down * np.sin(angles)], 1)
        cv2.fillPoly(mask, [corners.astype(np.int32)], 1)
    return mask > 0


def edit_pair(rng, photographs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(target, control, where they differ): pasted, painted over, made brighter or darker, or inverted, in plain sight."""
    while True:
        control, mask = crop(rng, photographs), shape(rng)
        edits = (
            lambda picture: crop(rng, photographs),
            lambda picture: np.broadcast_to(rng.integers(0, 256, 3), picture.shape),
            lambda picture: picture + rng.choice([-1, 1]) * rng.uniform(35, 90),
            lambda picture: 255 - picture,
        )
        edited = edits[rng.integers(len(edits))](control.astype(np.float32))
        target = np.where(mask[..., None], edited, control).clip(0, 255).astype(np.uint8)
        if mask.mean() > 0.01 and (np.abs(target.astype(int) - control)[mask].max(axis=1) >= 24).mean() >= 0.95:
            return target, control, mask


def test_edits_are_found_after_compression(photographs):
    rng = np.random.default_rng(0)
    reached = []
    for _ in range(200):
        target, control, mask = edit_pair(rng, photographs)
        reached.append(iou(differing(jpeg(target), jpeg(control)), mask))
    assert min(reached) >= 0.95, sorted(reached)[:5]


def test_a_pair_that_was_only_compressed_does_not_differ(photographs):
    rng = np.random.default_rng(1)
    for quality in (85, 90, 95):
        for _ in range(10):
            picture = crop(rng, photographs)
            assert not differing(jpeg(picture, quality), jpeg(picture)).any()


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (17, 16)])
def test_small_pictures_have_a_difference_too(size):
    black = np.zeros((*size, 3), np.uint8)
    assert not differing(black, black).any()
    assert differing(black + 255, black).shape == size


def run(folder: Path, *flags: object) -> int:
    paths = ["--images", str(folder / "in"), "--masks", str(folder / "out"), "--sheet_limit", "0"]
    return main(["generate", *paths, *map(str, flags)])


def test_the_command_masks_what_was_edited(tmp_path, photographs, capsys):
    rng = np.random.default_rng(2)
    target, control, mask = edit_pair(rng, photographs)
    for folder in ("in/a", "control/a"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(target).save(tmp_path / "in" / "a" / "edit.jpg", quality=90)
    Image.fromarray(control).save(tmp_path / "control" / "a" / "edit.jpg", quality=90)
    for folder in ("in", "control"):
        Image.fromarray(control).save(tmp_path / folder / "same.png")
    Image.fromarray(control).save(tmp_path / "in" / "alone.png")
    write_clip(tmp_path / "in" / "clip.mp4", [control, target, control])
    write_clip(tmp_path / "control" / "clip.mp4", [control] * 3)
    assert run(tmp_path, "--backend", "difference", "--difference_dir", tmp_path / "control") == 1
    said = capsys.readouterr()
    assert f"Nothing found: {tmp_path / 'in' / 'same.png'} (target and control do not differ)" in said.out
    assert "alone.png has no control of its stem" in said.err
    assert iou(np.asarray(Image.open(tmp_path / "out" / "a" / "edit.png")) > 127, mask) >= 0.95
    frames = [frame > 127 for frame in read_frames(tmp_path / "out" / "clip")]
    assert [frame.any() for frame in frames] == [False, True, False]
    assert iou(frames[1], mask) >= 0.9
    assert sorted(contents(tmp_path / "out"))[0] == "a/edit.png"
    assert run(tmp_path, "--backend", "difference") == 2
    assert "--difference_dir" in capsys.readouterr().err
    assert run(tmp_path, "--backend", "difference", "--text_prompt", "hat") == 2
    assert "reads no words, it masks what differs" in capsys.readouterr().err


def logo(height: int = 40, width: int = 90) -> tuple[np.ndarray, np.ndarray]:
    """(picture, mask): letters on a plate."""
    picture = np.full((height, width, 3), (200, 30, 60), np.uint8)
    cv2.putText(picture, "LOGO", (6, 28), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (255, 255, 255), 2, cv2.LINE_AA)
    mask = np.zeros((height, width), np.uint8)
    cv2.rectangle(mask, (2, 2), (width - 3, height - 3), 1, -1)
    return picture, mask > 0


def pasted(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The picture with the logo in its lower right corner, and where it is."""
    mark, mask = logo()
    where = np.zeros(picture.shape[:2], bool)
    corner = np.s_[-mask.shape[0] - 10 : -10, -mask.shape[1] - 10 : -10]
    picture, region = picture.copy(), where[corner]
    picture[corner][mask] = mark[mask]
    region[mask] = True
    return picture, where


def test_a_logo_that_is_in_every_photograph_is_left_out_of_the_masks(tmp_path, photographs, capsys):
    rng = np.random.default_rng(3)
    (tmp_path / "in").mkdir()
    for number in range(40):
        picture, where = pasted(crop(rng, photographs))
        Image.fromarray(picture).save(tmp_path / "in" / f"{number:02d}.jpg", quality=90)
    Image.fromarray(crop(rng, photographs, 100)).save(tmp_path / "in" / "other.png")
    assert run(tmp_path, "--backend", "static") == 1
    assert "other.png: fewer than 8 pictures of 100x100" in capsys.readouterr().err
    for number in (0, 17, 39):
        mask = np.asarray(Image.open(tmp_path / "out" / f"{number:02d}.png"))
        assert iou(mask < 128, where) >= 0.9
    assert len(contents(tmp_path / "out")) == 40


def test_photographs_have_nothing_in_common(tmp_path, photographs, capsys):
    rng = np.random.default_rng(4)
    (tmp_path / "in").mkdir()
    for number in range(40):
        Image.fromarray(crop(rng, photographs)).save(tmp_path / "in" / f"{number:02d}.jpg", quality=90)
    assert run(tmp_path, "--backend", "static") == 0
    said = capsys.readouterr().out
    assert "0 masks written, 40 without a detection" in said
    assert "(nothing in it is the same everywhere)" in said


def test_a_logo_in_a_clip_is_left_out_of_every_frame(tmp_path, photographs):
    rng = np.random.default_rng(5)
    (tmp_path / "in").mkdir()
    frames = [pasted(crop(rng, photographs)) for _ in range(12)]
    write_clip(tmp_path / "in" / "clip.mp4", [frame for frame, _ in frames])
    assert run(tmp_path, "--backend", "static") == 0
    masks = list(read_frames(tmp_path / "out" / "clip"))
    assert len(masks) == 12
    assert all(iou(mask < 128, frames[0][1]) >= 0.85 for mask in masks)


def test_too_few_pictures_tell_nothing():
    spread = Spread()
    for _ in range(7):
        spread.add(np.zeros((8, 8, 3), np.uint8))
    assert spread.static() is None


def test_only_the_given_seconds_of_a_clip_count(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    write_clip(tmp_path / "in" / "clip.mp4", [np.full((32, 32, 3), 100, np.uint8)] * 20, fps=4)
    assert run(tmp_path, "--backend", "whole", "--intervals", "0.5-1.5", "0:04-") == 0
    white = [frame.min() > 127 for frame in read_frames(tmp_path / "out" / "clip")]
    assert [number for number, one in enumerate(white) if one] == [2, 3, 4, 5, 16, 17, 18, 19]
    assert not any(
        frame.any() for frame, one in zip(read_frames(tmp_path / "out" / "clip"), white, strict=True) if not one
    )
    for bad in ("4-1", "x", "-3", "1"):
        assert run(tmp_path, "--backend", "whole", f"--intervals={bad}") == 2
        assert "write START-END in seconds" in capsys.readouterr().err
