"""Crops: what the trainer's crop cuts off is what a brute-force count says, and crops to the mask lose nothing of it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.cache.dataset import plain_dataset
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.items import bucket_size, buckets_of
from masked_loss_triton.cli import main
from masked_loss_triton.masks.crops import crop_around, cut, cut_share, kept_box
from masked_loss_triton.masks.geometry import resize_to_bucket

RESOLUTIONS = ((960, 544), (512, 512), (256, 256), (640, 384))


def triples(count: int, seed: int):
    """Random (mask, resolution, bucket of the trainer)."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        width, height = (int(side) for side in np.exp(rng.uniform(np.log(20), np.log(900), 2)))
        mask = np.zeros((height, width), np.uint8)
        for _ in range(rng.integers(1, 4)):
            x, y = rng.integers(0, width), rng.integers(0, height)
            right, bottom = x + rng.integers(1, width + 1), y + rng.integers(1, height + 1)
            mask[y:bottom, x:right] = rng.integers(1, 256)
        resolution = RESOLUTIONS[rng.integers(len(RESOLUTIONS))]
        bucket = min(buckets_of(resolution, 16), key=lambda one: (abs(one[0] / one[1] - width / height), one))
        yield mask, resolution, bucket


def test_the_share_that_is_cut_is_that_of_a_count():
    """Every pixel of the picture is sixteen points; each is looked up in the scaled picture, as the trainer crops it."""
    for mask, _, bucket in triples(1000, 0):
        height, width = mask.shape
        scale = max(bucket[0] / width, bucket[1] / height)
        inside = []
        for length, wanted in ((height, bucket[1]), (width, bucket[0])):
            scaled = int(length * scale + 0.5)
            points = (np.arange(length * 16) + 0.5) / 16 * scaled / length - (scaled - wanted) // 2
            inside.append(((points >= 0) & (points < wanted)).reshape(length, 16).mean(axis=1))
        total = int(mask.sum())
        kept = float(inside[0] @ mask.astype(np.float64) @ inside[1])
        # Sixteen points a pixel are off by half a point at each of four edges.
        rows, columns = mask.sum(axis=1).max(), mask.sum(axis=0).max()
        assert cut_share(mask, bucket) == pytest.approx(1 - kept / total, abs=(rows + columns) / 16 / total + 1e-9)


def test_the_kept_box_is_what_the_trainer_keeps():
    """A picture of numbered columns, through the trainer's own resize."""
    for width, height, bucket in ((300, 200, (128, 128)), (100, 300, (64, 64)), (640, 360, (320, 320))):
        left, _, right, _ = kept_box((width, height), bucket)
        ramp = np.repeat(np.linspace(0, 1, width, dtype=np.float32)[None], height, 0)
        kept = resize_to_bucket(ramp, bucket)
        expected = [(edge - 0.5) / (width - 1) for edge in (left, right)]
        pixel = (right - left) / bucket[0] / (width - 1)
        assert kept[0, 0] == pytest.approx(expected[0] + pixel / 2, abs=2 / 255)
        assert kept[0, -1] == pytest.approx(expected[1] - pixel / 2, abs=2 / 255)


def test_a_crop_has_all_of_the_mask_and_the_trainer_cuts_nothing_of_it(tmp_path):
    for mask, resolution, _ in triples(1000, 1):
        box, bucket = crop_around(mask, buckets_of(resolution, 16), 0.1)
        ys, xs = np.nonzero(mask)
        assert box[0] <= xs.min() + 1e-6
        assert box[1] <= ys.min() + 1e-6
        assert box[2] >= xs.max() + 1 - 1e-6
        assert box[3] >= ys.max() + 1 - 1e-6
        assert (box[2] - box[0]) / (box[3] - box[1]) == pytest.approx(bucket[0] / bucket[1])
        # In the shape of a bucket, the trainer gives it that bucket, and crops nothing.
        dataset = plain_dataset(tmp_path, tmp_path / "masks", resolution, video=False)
        assert bucket_size(bucket, dataset, FAMILIES["wan"]) == bucket
        crop = cut(mask, box, bucket, "constant")
        assert crop.shape == (bucket[1], bucket[0])
        assert cut_share(crop, bucket) == 0
        # All of its weight is there, to rounding: what a pixel of the crop covers, times its value.
        area = (box[2] - box[0]) * (box[3] - box[1]) / (bucket[0] * bucket[1])
        if bucket[0] <= box[2] - box[0]:
            assert crop.sum() * area == pytest.approx(
                mask.sum(), abs=0.5 * area * (crop > 0).sum() + area * 255 * sum(bucket)
            )


@pytest.fixture
def folder(tmp_path):
    """A wide picture with a subject at its left end, its mask and caption; one without a mask."""
    for name in ("photos/a", "masks/a"):
        (tmp_path / name).mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 256, (300, 900, 3), np.uint8)
    mask = np.zeros((300, 900), np.uint8)
    cv2.circle(mask, (90, 150), 80, 255, -1)
    Image.fromarray(picture).save(tmp_path / "photos" / "a" / "wide.png")
    Image.fromarray(mask).save(tmp_path / "masks" / "a" / "wide.png")
    (tmp_path / "photos" / "a" / "wide.txt").write_text("a disc")
    Image.fromarray(picture).save(tmp_path / "photos" / "alone.png")
    return tmp_path


def run(folder, *flags):
    paths = [
        f"--{name}={folder / place}" for name, place in (("images", "photos"), ("masks", "masks"), ("output", "out"))
    ]
    return main(["crop", *paths, *map(str, flags)])


def test_the_command_writes_crops_masks_and_captions_and_goes_on_where_it_was(folder, capsys):
    assert run(folder, "--resolution", 256) == 1
    said = capsys.readouterr()
    assert "alone.png has no mask in" in said.err
    assert "1 crops written" in said.out
    picture = np.asarray(Image.open(folder / "out" / "images" / "a" / "wide.png"))
    mask = np.asarray(Image.open(folder / "out" / "masks" / "a" / "wide.png"))
    assert picture.shape[:2] == mask.shape
    assert mask.shape[::-1] in buckets_of((256, 256), 16)
    assert (folder / "out" / "images" / "a" / "wide.txt").read_text() == "a disc"
    assert not mask[:, -1].any()
    before = (folder / "out" / "images" / "a" / "wide.png").stat().st_mtime_ns
    assert run(folder, "--resolution", 256) == 1
    assert "0 crops written" in capsys.readouterr().out
    assert (folder / "out" / "images" / "a" / "wide.png").stat().st_mtime_ns == before
    Image.fromarray(mask).save(folder / "out" / "masks" / "a" / "wide.png")
    assert run(folder, "--resolution", 256) == 1
    assert "is already there, and is no crop" in capsys.readouterr().err


def test_a_caption_that_was_edited_is_never_written_over(folder, capsys):
    edited = folder / "out" / "images" / "a" / "wide.txt"
    edited.parent.mkdir(parents=True)
    edited.write_text("a disc, edited by hand")
    assert run(folder, "--resolution", 256) == 1
    assert f"{edited} is already there: move it, or give another --output" in capsys.readouterr().err
    assert edited.read_text() == "a disc, edited by hand"
    assert not edited.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--margin", "3"], "--margin"),
        (["--resolution", "2"], "--resolution"),
        (["--captions", ""], "--captions '' is not an extension"),
        (["--captions", "a/b"], "--captions 'a/b' is not an extension"),
    ],
)
def test_bad_flags_are_one_line(folder, capsys, flags, said):
    assert run(folder, "--resolution", 256, *flags) == 2
    assert said in capsys.readouterr().err
