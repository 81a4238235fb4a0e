"""Photographs to RGBA files to latent caches to tensors, and a folder of the user's with all its oddities."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from masked_loss_triton.demo import dataset
from masked_loss_triton.demo.encoder import encode
from masked_loss_triton.demo.photos import Photo
from masked_loss_triton.errors import UserError


@pytest.fixture
def warnings():
    return []


def half_mask(height, width):
    """1 in the left half."""
    mask = np.zeros((height, width), np.float32)
    mask[:, : width // 2] = 1
    return mask


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_the_mask_travels_as_alpha_into_a_cache_with_musubi_names(tmp_path, warnings):
    rgb = noise(64, 64)
    files = dataset.write_rgba([Photo("dog", rgb, half_mask(64, 64))], tmp_path / "photos", warnings.append)
    caches = dataset.write_caches(files, tmp_path / "caches", side=64)
    assert [cache.name for cache in caches] == ["dog_0064x0064_wan.safetensors"]
    with safe_open(caches[0], "pt") as cache:
        assert set(cache.keys()) == {"latents_1x8x8_float32", "mask_weights_1x8x8_float32"}
        assert cache.metadata()["architecture"] == "wan"
    examples = dataset.read_caches(caches, torch.device("cpu"))
    assert examples.names == ["dog"]
    torch.testing.assert_close(examples.latents[0], encode(rgb), atol=0, rtol=0)
    torch.testing.assert_close(examples.masks[0, 0, 0], torch.tensor([1.0] * 4 + [0.0] * 4), atol=0, rtol=0)
    assert examples.masks.shape == (1, 1, 8, 8)
    assert not warnings


def test_the_cache_is_named_by_the_size_of_the_picture_and_holds_its_centre(tmp_path, warnings):
    rgb = noise(64, 128)
    mask = np.zeros((64, 128), np.float32)
    mask[:, 32:64] = 1
    files = dataset.write_rgba([Photo("wide", rgb, mask)], tmp_path / "photos", warnings.append)
    (cache,) = dataset.write_caches(files, tmp_path / "caches", side=64)
    assert cache.name == "wide_0128x0064_wan.safetensors"
    examples = dataset.read_caches([cache], torch.device("cpu"))
    torch.testing.assert_close(examples.latents[0], encode(np.ascontiguousarray(rgb[:, 32:96])), atol=0, rtol=0)
    assert examples.masks[0, 0, 0].tolist() == [1] * 4 + [0] * 4


def test_colours_under_transparent_pixels_are_kept(tmp_path, warnings):
    rgb = np.full((1200, 1200, 3), 200, np.uint8)
    (file,) = dataset.write_rgba([Photo("big", rgb, half_mask(1200, 1200))], tmp_path / "photos", warnings.append)
    with Image.open(file) as image:
        assert image.mode == "RGBA"
        assert image.size == (512, 512)
        assert np.asarray(image)[..., :3].min() == 200


def test_a_folder_gives_alpha_first_then_the_mask_beside_then_none(tmp_path, warnings):
    alpha = (half_mask(40, 40) * 255).astype(np.uint8)
    Image.fromarray(np.dstack([noise(40, 40), alpha])).save(tmp_path / "a_alpha.png")
    Image.fromarray(noise(40, 40)).save(tmp_path / "b_beside.jpg")
    Image.fromarray(np.kron(alpha, np.ones((2, 2), np.uint8))).save(tmp_path / "b_beside_mask.png")
    Image.fromarray(np.dstack([noise(40, 40), np.full((40, 40), 255, np.uint8)])).save(tmp_path / "c_opaque.png")
    Image.fromarray(noise(40, 40)).save(tmp_path / "gas_mask.png")
    (tmp_path / "notes.txt").write_text("not a picture")
    photos = {photo.name: photo for photo in dataset.read_folder(tmp_path, warnings.append)}
    assert list(photos) == ["a_alpha", "b_beside", "c_opaque", "gas_mask"]
    np.testing.assert_array_equal(photos["a_alpha"].alpha, half_mask(40, 40))
    np.testing.assert_array_equal(photos["b_beside"].alpha, half_mask(40, 40))
    assert photos["c_opaque"].alpha is None
    assert photos["gas_mask"].alpha is None
    assert not warnings


def test_a_broken_file_is_named_in_one_line_and_skipped(tmp_path, warnings):
    Image.fromarray(noise(40, 40)).save(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (tmp_path / "empty.jpg").touch()
    assert [photo.name for photo in dataset.read_folder(tmp_path, warnings.append)] == ["good"]
    assert len(warnings) == 2
    for warning, name in zip(warnings, ("broken.png", "empty.jpg"), strict=True):
        assert name in warning
        assert "\n" not in warning


def test_two_files_of_one_stem_get_two_names(tmp_path, warnings):
    for name in ("cat.jpg", "cat.png"):
        Image.fromarray(noise(40, 40)).save(tmp_path / name)
    assert [photo.name for photo in dataset.read_folder(tmp_path, warnings.append)] == ["cat", "cat_2"]


def test_names_that_are_long_or_not_text_are_made_usable(tmp_path, warnings):
    for name in ("x" * 200 + ".png", "bad\udcff.png"):
        Image.fromarray(noise(40, 40)).save(tmp_path / name)
    names = [photo.name for photo in dataset.read_folder(tmp_path, warnings.append)]
    assert names == ["bad?", "x" * 80]


def test_a_folder_of_many_photographs_is_cut_short_and_says_so(tmp_path, warnings):
    for i in range(15):
        Image.fromarray(noise(16, 16)).save(tmp_path / f"{i:02}.png")
    assert len(dataset.read_folder(tmp_path, warnings.append)) == 12
    assert "first 12" in warnings[0]


def test_a_folder_without_a_usable_photograph_is_an_error(tmp_path, warnings):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="no photograph in it can be used"):
        dataset.read_folder(tmp_path, warnings.append)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mask_of_nothing_or_everything_is_skipped(tmp_path, warnings, share):
    photos = [
        Photo("useless", noise(40, 40), np.full((40, 40), share, np.float32)),
        Photo("good", noise(40, 40), half_mask(40, 40)),
    ]
    files = dataset.write_rgba(photos, tmp_path / "photos", warnings.append)
    assert [file.stem for file in files] == ["good"]
    assert "useless: its mask covers" in warnings[0]


def test_no_usable_mask_at_all_is_an_error(tmp_path, warnings):
    with pytest.raises(UserError, match="no photograph with a usable mask"):
        dataset.write_rgba([Photo("flat", np.zeros((40, 40, 3), np.uint8))], tmp_path / "photos", warnings.append)
