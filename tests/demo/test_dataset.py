"""Photographs to pictures, masks and latent caches, and those to tensors, by the same code as a user's."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from masked_loss_triton.demo.dataset import make_dataset, read_caches, write_photo
from masked_loss_triton.demo.encoder import encode
from masked_loss_triton.demo.photos import Photo, shipped_photos
from masked_loss_triton.errors import UserError
from tests.demo.support import half_mask, noise


@pytest.fixture
def warnings():
    return []


def test_the_mask_travels_as_alpha_into_a_cache_with_musubi_names(tmp_path, warnings):
    rgb = noise(64, 64)
    make_dataset([Photo("dog", rgb, half_mask(64, 64))], tmp_path, 64, warnings.append)
    (path,) = (tmp_path / "caches").iterdir()
    assert path.name == "dog_0064x0064_wan.safetensors"
    with safe_open(path, "pt") as cache:
        assert set(cache.keys()) == {"latents_1x8x8_float32", "mask_weights_1x8x8_float32"}
        assert cache.metadata()["architecture"] == "wan"
        assert cache.metadata()["mask_source"] == "alpha"
    examples = read_caches(tmp_path, torch.device("cpu"))
    assert examples.names == ["dog"]
    torch.testing.assert_close(examples.latents[0], encode(rgb), atol=0, rtol=0)
    torch.testing.assert_close(examples.masks[0, 0, 0], torch.tensor([1.0] * 4 + [0.0] * 4), atol=0, rtol=0)
    assert examples.masks.shape == (1, 1, 8, 8)
    assert not warnings


def test_the_cache_is_named_by_the_size_of_the_picture_and_holds_its_centre(tmp_path, warnings):
    rgb = noise(64, 128)
    mask = np.zeros((64, 128), np.uint8)
    mask[:, 32:64] = 255
    make_dataset([Photo("wide", rgb, mask)], tmp_path, 64, warnings.append)
    assert [path.name for path in (tmp_path / "caches").iterdir()] == ["wide_0128x0064_wan.safetensors"]
    examples = read_caches(tmp_path, torch.device("cpu"))
    torch.testing.assert_close(examples.latents[0], encode(np.ascontiguousarray(rgb[:, 32:96])), atol=0, rtol=0)
    assert examples.masks[0, 0, 0].tolist() == [1] * 4 + [0] * 4


def test_colours_under_transparent_pixels_are_kept(tmp_path):
    file = write_photo(Photo("big", np.full((1200, 1200, 3), 200, np.uint8), half_mask(1200, 1200)), tmp_path)
    with Image.open(file) as image:
        assert image.mode == "RGBA"
        assert image.size == (512, 512)
        assert np.asarray(image)[..., :3].min() == 200


def test_masks_of_grabcut_are_called_so(tmp_path, warnings, monkeypatch):
    monkeypatch.setenv("U2NET_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # the package with the weights is not there
    rgb = np.full((120, 160, 3), (40, 90, 160), np.uint8)
    rgb[30:90, 50:110] = (220, 120, 30)
    make_dataset([Photo("own", rgb, None)], tmp_path, 64, warnings.append)
    (said,) = warnings
    assert said.startswith("the masks are GrabCut's: u2netp.onnx is not on this machine")


def test_a_photograph_without_a_mask_gets_one_by_generate(tmp_path, warnings):
    """In the middle of the picture, where nobody said where the subject is."""
    rgb = np.full((120, 160, 3), (40, 90, 160), np.uint8)
    rgb[30:90, 50:110] = (220, 120, 30)
    rgb += noise(120, 160) // 32
    make_dataset([Photo("square", rgb)], tmp_path, 64, warnings.append)
    with Image.open(tmp_path / "masks" / "square.png") as image:
        mask = np.asarray(image)
    assert mask[40:80, 60:100].min() > 230
    assert mask[:20].max() < 26
    assert read_caches(tmp_path, torch.device("cpu")).masks.max() == 1


@pytest.mark.parametrize("photo", shipped_photos(), ids=lambda photo: photo.name)
def test_a_subject_is_found_where_it_is(photo, tmp_path, warnings):
    make_dataset([photo], tmp_path, 64, warnings.append)
    with Image.open(tmp_path / "masks" / f"{photo.name}.png") as image:
        mask = np.asarray(image) / 255
    left, top, right, bottom = (round(edge * len(mask)) for edge in photo.box)
    assert mask[top:bottom, left:right].mean() > 0.4
    # The astronaut's helmet is outside of her box.
    assert mask[top:bottom, left:right].sum() > 0.8 * mask.sum()


@pytest.mark.parametrize("share", [0, 255])
def test_a_mask_of_nothing_or_everything_is_skipped(tmp_path, warnings, share):
    photos = [
        Photo("useless", noise(40, 40), np.full((40, 40), share, np.uint8)),
        Photo("good", noise(40, 40), half_mask(40, 40)),
    ]
    make_dataset(photos, tmp_path, 64, warnings.append)
    assert [file.stem for file in (tmp_path / "photos").iterdir()] == ["good"]
    assert "useless: its mask covers" in warnings[0]


@pytest.mark.parametrize(
    "photo",
    [Photo("unmasked", noise(40, 40), np.zeros((40, 40), np.uint8)), Photo("tiny", np.zeros((1, 1, 3), np.uint8))],
    ids=lambda photo: photo.name,
)
def test_no_usable_mask_at_all_is_an_error(tmp_path, warnings, photo):
    with pytest.raises(UserError, match="no photograph with a usable mask"):
        make_dataset([photo], tmp_path, 64, warnings.append)
