"""The experiment is fair: every way starts from the same weights and sees the same batches, and the base stays as it is."""

import dataclasses

import numpy as np
import pytest
import torch

from masked_loss_triton import masked_loss
from masked_loss_triton.demo import model, tuning
from masked_loss_triton.demo.evaluation import Test
from masked_loss_triton.demo.tuning import WAYS, Examples, draws, noisy_latents, tune

CPU = torch.device("cpu")


@pytest.fixture
def subjects():
    masks = torch.zeros(2, 1, 6, 8)
    masks[..., :3] = 1
    names = ["one", "two"]
    return Examples(names, torch.randn(2, 16, 1, 6, 8), tuning.captions_at(names, ["here", "there"]), masks)


@pytest.fixture
def base():
    return model.build_model(3, CPU).eval()


def test_the_same_seed_gives_the_same_model():
    first, second = (model.build_model(3, CPU).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["proj_out.weight"], model.build_model(4, CPU).state_dict()["proj_out.weight"])


def test_building_a_model_leaves_the_random_state_alone(base):
    before = torch.get_rng_state()
    model.with_lora(model.build_model(0, CPU), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_the_same_seed_gives_the_same_batches(subjects):
    for one, two in zip(draws(subjects, 5, 1), draws(subjects, 5, 1), strict=True):
        assert torch.equal(one.index, two.index)
        assert torch.equal(one.caption, two.caption)
        assert torch.equal(one.noise, two.noise)
        assert torch.equal(one.time, two.time)


def test_times_cover_low_and_high_noise_in_each_batch(subjects):
    for draw in draws(subjects, 20, 0):
        low, high = draw.time.min(), draw.time.max()
        assert 0 < low < 0.5 < high < 1


def test_the_flow_goes_from_the_latents_to_the_noise(subjects):
    noise = torch.randn_like(subjects.latents)
    noisy = noisy_latents(subjects.latents, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(noisy[0], subjects.latents[0])
    assert torch.equal(noisy[1], noise[1])


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.key)
def test_tuning_changes_the_lora_and_nothing_else(base, subjects, way):
    tuned = model.with_lora(base, 0)
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    losses = []
    tune(tuned, subjects, way, 3, 0, "torch", lambda _, loss: losses.append(loss))
    changed = {name for name, value in tuned.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name}
    assert np.isfinite(losses).all()
    assert len(losses) == 3


def test_the_teacher_is_the_base_model(base, subjects):
    tuned = model.with_lora(base, 0)
    tune(tuned, subjects, WAYS[0], 3, 0, "torch", lambda *_: None)
    time, text = torch.tensor([0.3, 0.7]), subjects.text[:, 0]
    with torch.no_grad():
        expected = model.predict(base, subjects.latents, time, text)
        student = model.predict(tuned, subjects.latents, time, text)
    teacher = tuning.teacher(tuned, subjects.latents, time, text)
    assert torch.equal(teacher, expected)
    assert not torch.equal(student, expected)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.key)
def test_a_step_is_the_loss_that_its_way_says(base, subjects, way):
    tuned = model.with_lora(base, 0)
    tune(
        tuned, subjects, WAYS[0], 3, 0, "torch", lambda *_: None
    )  # away from the base model, so that a prior is no zero
    draw = next(draws(subjects, 1, 5))
    latents, text = subjects.latents[draw.index], subjects.text[draw.index, draw.caption]
    noisy = noisy_latents(latents, draw.noise, draw.time)
    with torch.no_grad():
        pred = model.predict(tuned, noisy, draw.time, text)
        prior = model.predict(base, noisy, draw.time, text) if way.key == "mask_prior" else None
        mask = None if way.key == "no_mask" else subjects.masks[draw.index]
        expected = masked_loss(pred, draw.noise - latents, mask, way.config, prior=prior)
        found = tuning.step_loss(tuned, subjects, draw, way, seed=0, step=0)
    torch.testing.assert_close(found, expected)


def test_a_way_that_keeps_a_part_computes_a_part_in_the_middle_blocks(base, subjects):
    tuned, counts = model.with_lora(base, 0).train(), []
    for block in tuned.blocks:
        block.register_forward_hook(lambda module, given, out: counts.append(out.shape[1]))
    half = dataclasses.replace(WAYS[1], keep=0.5)
    tuning.step_loss(tuned, subjects, next(draws(subjects, 1, 5)), half, seed=0, step=0).backward()
    assert counts == [48, 24, 24, 48]


def test_an_untuned_lora_scores_as_the_base_does_with_no_drift(base, subjects):
    test = Test(base, subjects)
    expected, untuned = test.score(base), test.score(model.with_lora(base, 0))
    assert untuned.drift_outside == untuned.drift_inside == expected.drift_outside == 0
    assert (untuned.inside, untuned.outside) == (expected.inside, expected.outside)


def test_scores_weigh_the_inside_and_the_outside_apart(base, subjects):
    test = Test(base, subjects)
    scores = test.score(base)
    whole = 3 / 8 * scores.inside + 5 / 8 * scores.outside
    errors = [
        (test.predict_at(base, noise, time) - (noise - subjects.latents)).square().mean().item()
        for noise in test.noises
        for time in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert whole == pytest.approx(np.mean(errors), rel=1e-5)


def test_a_saved_lora_is_loaded_again_by_diffusers(base, subjects, tmp_path):
    tuned = model.with_lora(base, 0)
    tune(tuned, subjects, WAYS[1], 3, 0, "torch", lambda *_: None)
    model.save_lora(tuned, tmp_path / "lora.safetensors")
    loaded = model.build_model(3, CPU).eval()
    loaded.load_lora_adapter(tmp_path, weight_name="lora.safetensors")
    time, text = torch.tensor([0.3, 0.7]), subjects.text[:, 0]
    with torch.no_grad():
        expected = model.predict(tuned, subjects.latents, time, text)
        torch.testing.assert_close(model.predict(loaded, subjects.latents, time, text), expected, atol=1e-6, rtol=1e-6)
