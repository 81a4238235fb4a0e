"""The linear encoder: orthonormal, lapped, decoded by its transpose, of WAN's latent shape and about its variance."""

import numpy as np
import pytest
import torch

from masked_loss_triton.demo.encoder import analysis_matrix, decode, encode
from masked_loss_triton.demo.photos import shipped_photos


@pytest.mark.parametrize("length", [8, 16, 96])
def test_the_transform_is_orthonormal(length):
    matrix = analysis_matrix(length)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(length), atol=1e-12)


def test_latents_have_the_shape_of_a_video_vae_with_one_frame():
    latents = encode(np.zeros((24, 40, 3), np.uint8))
    assert latents.shape == (16, 1, 3, 5)
    assert latents.dtype == torch.float32
    assert latents.is_contiguous()


def test_one_colour_is_the_lowest_frequency_alone_and_survives_the_round_trip():
    rgb = np.full((48, 64, 3), (90, 120, 150), np.uint8)
    latents = encode(rgb)
    assert latents.std(dim=(2, 3)).max() < 1e-6
    assert abs(decode(latents).astype(int) - rgb).max() <= 1


def test_noise_of_the_latents_shows_no_grid_of_blocks():
    """Neighbours on two sides of a border differ about as much as those within a block: 1.3 times, where a DCT of each block by
    itself makes it 5."""
    generator = torch.Generator().manual_seed(0)
    picture = decode(0.3 * torch.randn((16, 1, 12, 12), generator=generator)).astype(float)
    steps = abs(np.diff(picture, axis=1)).mean(axis=(0, 2))
    border = np.arange(len(steps)) % 8 == 7
    assert steps[border].mean() < 2 * steps[~border].mean()


def test_latents_survive_decoding_and_encoding():
    smooth = encode(np.full((16, 16, 3), (90, 120, 150), np.uint8)) + 0.1 * torch.randn(16, 1, 2, 2)
    # A picture holds whole numbers: half a grey level, in units of a channel, is below 0.1.
    torch.testing.assert_close(encode(decode(smooth)), smooth, atol=0.1, rtol=0)


def test_a_photograph_decodes_to_something_close_to_it():
    rgb = shipped_photos()[0].rgb
    error = (decode(encode(rgb)).astype(float) - rgb) ** 2
    peak_signal_to_noise = 10 * np.log10(255**2 / error.mean())
    assert peak_signal_to_noise > 25


def test_the_photographs_have_about_unit_variance():
    values = torch.cat([encode(np.ascontiguousarray(photo.rgb[:296, :296])).flatten() for photo in shipped_photos()])
    assert 0.5 < values.var() < 2
    assert abs(values.mean()) < 0.3


@pytest.mark.parametrize(
    "rgb",
    [
        np.zeros((16, 16, 3), np.float32),
        np.zeros((16, 16), np.uint8),
        np.zeros((16, 16, 4), np.uint8),
        np.zeros((16, 12, 3), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
    ],
    ids=["float", "grey", "rgba", "width of 12", "empty"],
)
def test_other_pictures_are_refused(rgb):
    with pytest.raises(ValueError, match="rgb must"):
        encode(rgb)


def test_other_latents_are_refused():
    with pytest.raises(ValueError, match=r"latents must be \(16, 1, h, w\)"):
        decode(torch.zeros(4, 1, 2, 2))
