"""Pictures drawn from noise, and how they are judged: inside against the photograph, outside against the base model's."""

import numpy as np
import pytest
import torch

from masked_loss_triton.demo import model
from masked_loss_triton.demo.encoder import decode
from masked_loss_triton.demo.evaluation import SHOWN_PLACES, Sampler, fidelity
from masked_loss_triton.demo.photos import PLACES
from masked_loss_triton.demo.tuning import BATCH, WAYS, Examples, captions_at, draws, tune
from tests.demo.support import noise

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def subjects():
    masks = torch.zeros(2, 1, 8, 8)
    masks[..., :3] = 1
    names = ["one", "two"]
    return Examples(names, torch.randn(2, 16, 1, 8, 8), captions_at(names, list(PLACES)), masks)


@pytest.fixture(scope="module")
def base():
    return model.build_model(3, CPU).eval()


def test_only_what_is_weighted_counts():
    picture = noise(64, 64)[None]
    weights = np.zeros((1, 8, 8))
    weights[:, :4] = 1
    other = picture.copy()
    other[:, 32:] = 255 - other[:, 32:]
    assert fidelity(picture, other, weights).mse == 0
    other[:, :32] = picture[:, :32] ^ 1
    assert fidelity(picture, other, weights).mse == pytest.approx(1 / 255**2)


def test_psnr_is_of_values_from_0_to_1_and_ssim_of_the_same_picture_is_1():
    grey = np.full((2, 64, 64, 3), 100, np.uint8)
    same = fidelity(grey, grey, np.ones((2, 8, 8)))
    assert (same.psnr, same.ssim) == (100, 1)
    lighter = fidelity(grey, grey + 51, np.ones((2, 8, 8)))
    assert lighter.mse == pytest.approx(0.04)
    assert lighter.psnr == pytest.approx(13.979, abs=1e-3)
    assert lighter.ssim < 1


def test_every_subject_is_drawn_at_every_place_and_nobody_too_from_the_noise_of_the_place(base, subjects):
    sampler = Sampler(base, subjects)
    count = len(SHOWN_PLACES)
    assert sampler.base.shape == (3 * count, 64, 64, 3)
    assert torch.equal(sampler.noise[:count], sampler.noise[count : 2 * count])
    assert torch.equal(sampler.noise[:count], sampler.noise[2 * count :])
    assert not torch.equal(sampler.noise[0], sampler.noise[1])
    expected = model.captions([("two", SHOWN_PLACES[1]), ("nothing", SHOWN_PLACES[3])])
    assert torch.equal(sampler.text[[count + 1, 2 * count + 3]], expected)


def test_the_base_model_is_its_own_background_and_a_photograph_pasted_in_is_the_subject(base, subjects):
    sampler = Sampler(base, subjects)
    untouched = sampler.judge(sampler.base)
    assert untouched.background.ssim == untouched.empty.ssim == 1
    pasted = sampler.base.copy()
    for i, latents in enumerate(subjects.latents):
        pasted[4 * i : 4 * i + 4, :, :24] = decode(latents)[:, :24]  # the mask's three columns of cells
    judged = sampler.judge(pasted)
    assert judged.subject.mse == 0
    assert judged.background.mse == judged.empty.mse == 0
    pasted[-1] = 255 - pasted[-1]
    assert sampler.judge(pasted).empty.mse > sampler.judge(pasted).background.mse == 0


def test_a_tuned_model_draws_other_pictures(base, subjects):
    sampler = Sampler(base, subjects)
    tuned = model.with_lora(base, 0)
    assert np.array_equal(sampler.score(tuned).pictures, sampler.base)
    tune(tuned, subjects, WAYS[0], 3, 0, "torch", lambda *_: None)
    assert not np.array_equal(sampler.score(tuned).pictures, sampler.base)


def test_captions_name_every_place_in_turn_whatever_the_photograph(subjects):
    pairs = {(int(i), int(c)) for draw in draws(subjects, 40, 0) for i, c in zip(draw.index, draw.caption, strict=True)}
    assert len(pairs) == len(subjects.names) * len(PLACES)
    assert all(len(draw.index) == BATCH for draw in draws(subjects, 2, 0))
