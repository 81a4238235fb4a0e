"""A mask lands on the pixels and cells where the trainer's own resize put the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from masked_loss_triton.masks import geometry
from masked_loss_triton.masks.frames import kept_frames
from masked_loss_triton.masks.geometry import group_frames, resize_to_bucket, to_latent
from tests.support import trainer_geometry as trainer


@pytest.mark.parametrize("index", range(len(trainer.RESIZES)))
def test_resize_equals_what_the_trainer_gave(index):
    size, bucket = trainer.RESIZES[index]
    with np.load(trainer.GEOMETRY) as stored:
        expected = stored[f"resize_{index}"]
    source = trainer.picture(size, index)
    kept = source.copy()
    result = resize_to_bucket(source, bucket)
    assert np.abs(result.astype(int) - expected).max() <= 1, "within 1/255, whatever versions of Pillow and OpenCV"
    as_float = resize_to_bucket(source.astype(np.float32) / 255, bucket)
    assert np.abs(as_float * 255 - expected).max() <= 1.01
    assert result.shape == bucket[::-1]
    assert np.array_equal(source, kept)


def test_colours_under_transparent_pixels_survive_in_both_directions():
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:, 10:, 3] = 255
    for bucket in ((16, 16), (48, 48)):
        result = resize_to_bucket(rgba, bucket)
        assert (result[..., 0] == 200).all()
        assert np.array_equal(result[..., 3], resize_to_bucket(rgba[..., 3], bucket))


def test_an_extreme_shape_is_cropped_without_building_the_whole(monkeypatch):
    strip = np.random.default_rng(0).integers(0, 256, (3, 700), dtype=np.uint8)
    whole = resize_to_bucket(strip, (256, 256))
    monkeypatch.setattr(geometry, "WHOLE_RESIZE_LIMIT", 1)
    assert np.abs(resize_to_bucket(strip, (256, 256)).astype(int) - whole).max() <= 1
    assert resize_to_bucket(np.full((1, 20000), 7, np.uint8), (960, 544)).shape == (544, 960)


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.float64), np.zeros((4, 4, 3), np.float32)])
def test_wrong_dtype_is_refused(bad):
    with pytest.raises(TypeError, match="array must be uint8"):
        resize_to_bucket(bad, (16, 16))


@pytest.mark.parametrize("shape", [(0, 4), (4, 4, 2), (4,)])
def test_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match="array must be"):
        resize_to_bucket(np.zeros(shape, np.uint8), (16, 16))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 12), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 10**6)
)
def test_to_latent_is_torch_area(rows, columns, extra_rows, extra_columns, whole, seed):
    rng = np.random.default_rng(seed)
    height, width = (rows * 8, columns * 8) if whole else (rows + extra_rows, columns + extra_columns)
    mask = rng.integers(0, 256, (height, width), dtype=np.uint8)
    result = to_latent(mask, (rows, columns))
    tensor = torch.from_numpy(mask)[None, None].double() / 255
    expected = torch.nn.functional.interpolate(tensor, size=(rows, columns), mode="area")[0, 0].numpy()
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
    np.testing.assert_array_equal(to_latent(np.full_like(mask, 255), (rows, columns)), 1)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_latent_frames_cover_the_frames_that_the_vae_codes_together(reduce):
    frames = np.random.default_rng(1).random((9, 2, 3), dtype=np.float32)
    result = group_frames(frames, 3, reduce)
    assert np.array_equal(result[0], frames[0])
    for k in (1, 2):
        group = frames[4 * k - 3 : 4 * k + 1]
        assert len(group) == 4
        np.testing.assert_allclose(result[k], getattr(group, reduce)(axis=0), atol=1e-7)


def test_frames_as_they_are_and_stills():
    frames = np.random.default_rng(1).random((3, 2, 2), dtype=np.float32)
    assert np.array_equal(group_frames(frames, 3), frames)
    assert np.array_equal(group_frames(frames[:1], 5), np.repeat(frames[:1], 5, axis=0))
    for count, latents in ((8, 3), (5, 1), (3, 4)):
        with pytest.raises(ValueError, match=f"{count} frames cannot be grouped into {latents}"):
            group_frames(np.zeros((count, 2, 2), np.float32), latents)
    with pytest.raises(ValueError, match="reduce must be"):
        group_frames(frames, 3, "median")


@pytest.mark.parametrize("case", trainer.STORED["kept"], ids=lambda case: f"{case['source']}-{case['target']}")
def test_rate_conversion_keeps_the_frames_that_the_trainer_keeps(case):
    assert list(kept_frames(120, case["source"], case["target"])) == case["frames"]


def test_without_a_rate_every_frame_is_kept():
    assert list(kept_frames(5, None, 16.0)) == list(range(5))
