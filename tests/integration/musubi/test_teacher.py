"""The prior in the trainer: the model before any adapter, where and when it is asked, and what it leaves as it was."""

from __future__ import annotations

import argparse
import random

import numpy as np
import pytest
import torch

from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi import schedule
from masked_loss_triton.integration.musubi.teacher import Teacher
from tests.integration.musubi.small_trainer import GENERATIONS, NAMES, LoRAModule, both, same, trained


def teacher_passes(monkeypatch) -> list[Teacher]:
    """Grows by one for each pass of a teacher; the pass itself is the real one."""
    seen = []
    inside = Teacher.in_place

    def watched(self, device):
        seen.append(self)
        return inside(self, device)

    monkeypatch.setattr(Teacher, "in_place", watched)
    return seen


@both
def test_a_prior_of_weight_0_is_none(labs, generation, monkeypatch):
    lab = labs("wan")
    seen = teacher_passes(monkeypatch)
    without = trained(generation, lab, "--use_mask_loss")
    zero = trained(generation, lab, "--use_mask_loss", "--inverted_mask_prior", "--inverted_mask_prior_weight", 0)
    assert same(zero, without)
    assert not seen
    with_prior = trained(generation, lab, "--use_mask_loss", "--inverted_mask_prior")
    assert len(seen) == 4
    assert not same(with_prior, without)


@pytest.mark.parametrize("family", NAMES)
def test_the_teacher_is_the_model_before_any_adapter(labs, family):
    trainer = trained("method", labs(family), "--use_mask_loss", "--inverted_mask_prior", learning_rate=1.0)
    batch = trainer.batches(argparse.Namespace(batch_size=2))[-1]
    sigma = torch.tensor([300.0, 700.0])
    noisy = torch.randn_like(batch["latents"])

    def predict():
        with torch.no_grad():
            return trainer.predict(trainer.transformer, batch["latents"], batch, noisy, noisy, sigma)[0]

    student = predict()
    with trainer.masked.teacher.in_place(torch.device("cpu")):
        teacher = predict()
    assert torch.equal(predict(), student)
    for adapter in trainer.masked.teacher.adapters.values():
        del adapter.org_forward.__self__.forward  # the layer's own again
    assert torch.equal(teacher, predict())
    assert not torch.equal(teacher, student)


def test_the_moving_average_and_its_return():
    layer = torch.nn.Linear(3, 3)
    model = torch.nn.Sequential(layer)
    adapter = LoRAModule("one", layer, 0.0)
    teacher = Teacher(model, 0.75)
    first = adapter.lora_up.weight.detach().clone()
    with torch.no_grad():
        adapter.lora_up.weight.fill_(4.0)
    teacher.update()
    torch.testing.assert_close(teacher.average["one.lora_up.weight"], first * 0.75 + 1.0)
    student = adapter.lora_up.weight.detach().clone()

    inside = []

    def fails_within(one):
        with one.in_place(torch.device("cpu")):
            inside.append((adapter.lora_up.weight.detach().clone(), adapter.multiplier))
            raise RuntimeError("in the forward")

    for one in (teacher, Teacher(model, None)):
        with pytest.raises(RuntimeError, match="in the forward"):
            fails_within(one)
        assert torch.equal(adapter.lora_up.weight, student)
        assert adapter.multiplier == 1
    torch.testing.assert_close(inside[0][0], teacher.average["one.lora_up.weight"])
    assert inside[1][1] == 0
    with pytest.raises(UserError, match="another network"):
        teacher.load({"two": torch.zeros(1)})
    with pytest.raises(UserError, match="needs an adapter"):
        Teacher(torch.nn.Linear(2, 2), None)


def test_dropout_draws_the_same_numbers_with_and_without_a_teacher(labs):
    lab = labs("wan")
    with_teacher = trained("method", lab, "--use_mask_loss", "--inverted_mask_prior", lora_dropout=0.3)
    without = trained("method", lab, "--use_mask_loss", lora_dropout=0.3)
    assert not same(with_teacher, without)
    assert all(torch.equal(a, b) for a, b in zip(with_teacher.draws, without.draws, strict=True))


def test_the_teacher_runs_only_where_a_sample_needs_it(labs, monkeypatch):
    lab = labs("wan")
    seen = teacher_passes(monkeypatch)
    prior = ["--use_mask_loss", "--inverted_mask_prior"]
    low, mixed = (lambda batch: [100.0, 150.0]), (lambda batch: [100.0, 900.0])
    gated = trained("method", lab, *prior, "--prior_timestep_threshold", 200, timesteps=low)
    assert not seen
    assert same(gated, trained("method", lab, "--use_mask_loss", timesteps=low))
    one = trained("method", lab, *prior, "--prior_timestep_threshold", 200, timesteps=mixed, max_train_steps=1)
    assert len(seen) == 1
    step = one.output.extra["masked_loss"]
    assert step.prior_gate.tolist() == [False, True]
    # The adapter starts at 0, where teacher and student agree: no pull yet, so a later step is looked at.
    later = trained("method", lab, *prior, "--prior_timestep_threshold", 200, timesteps=mixed, learning_rate=1.0)
    step = later.output.extra["masked_loss"]
    outside = (step.mask == 0).expand_as(later.output.pred)
    moved = (later.output.pred.grad * outside).flatten(1).any(1)
    assert moved.tolist() == [False, True]
    seen.clear()
    trained("method", labs("wan", "white"), *prior)
    assert not seen  # white masks leave no region
    trained("method", lab, *prior, "--mask_probability", 0)
    assert not seen
    trained("method", lab, *prior, "--prior_warmup_ratio", 1.0)
    assert len(seen) == 3  # all but the first of four steps


def test_swapped_blocks_come_back_after_the_teacher_and_before_the_student(labs, monkeypatch):
    order = []
    predict = GENERATIONS["method"].predict

    def watched(self, transformer, *rest):
        transformer.switch_block_swap_for_training = lambda: order.append("restored")
        order.append("student" if torch.is_grad_enabled() else "teacher")
        return predict(self, transformer, *rest)

    def with_swapped_blocks(self, args):
        self.blocks_to_swap = 2

    monkeypatch.setattr(GENERATIONS["method"], "predict", watched)
    flags = ["--use_mask_loss", "--inverted_mask_prior"]
    trained("method", labs("wan"), *flags, max_train_steps=1)
    assert order == ["teacher", "student"]
    order.clear()
    monkeypatch.setattr(GENERATIONS["method"], "handle_model_specific_args", with_swapped_blocks)
    trained("method", labs("wan"), *flags, max_train_steps=1)
    assert order == ["teacher", "restored", "student"]


def test_probability_is_a_function_of_seed_and_step():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    drawn = [schedule.this_time("prior", 0.3, 42, step) for step in range(4000)]
    random.random()
    torch.rand(1)
    assert drawn == [schedule.this_time("prior", 0.3, 42, step) for step in range(4000)]
    assert drawn != [schedule.this_time("prior", 0.3, 43, step) for step in range(4000)]
    assert drawn != [schedule.this_time("masked_loss", 0.3, 42, step) for step in range(4000)]
    assert abs(sum(drawn) / 4000 - 0.3) < 0.03
    random.setstate(before[0])
    torch.set_rng_state(before[2])
    schedule.this_time("prior", 0.3, 42, 5)
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert schedule.this_time("prior", 1.0, 1, 1)
    assert not schedule.this_time("prior", 0.0, 1, 1)


@pytest.mark.parametrize("threshold", [[], ["--prior_mask_threshold", 0.5]])
def test_a_prior_on_some_steps_is_the_same_in_expectation(labs, monkeypatch, threshold):
    """Its factor is 0 or the weight over the probability; the target's weights are those of a prior on every step."""
    lab, seen = labs("wan"), teacher_passes(monkeypatch)
    flags = ["--use_mask_loss", "--inverted_mask_prior", "--mask_gamma", 0.5, *threshold]
    given = {"trackers": [object()], "max_train_steps": 12}
    always = trained("method", lab, *flags, **given)
    seen.clear()
    some = trained("method", lab, *flags, "--prior_probability", 0.25, **given)
    factors = [logs["mask/prior_factor"] for logs in some.logs]
    drawn = [schedule.this_time("prior", 0.25, 7, step) for step in range(12)]
    assert factors == [0.5 / 0.25 if on else 0 for on in drawn]
    assert 0 < len(seen) == sum(drawn) < 12
    assert [logs["mask/weight"] for logs in some.logs] == [logs["mask/weight"] for logs in always.logs]
    assert all(torch.equal(a, b) for a, b in zip(some.draws, always.draws, strict=True))
    for loss, logs, factor in zip(some.losses, some.logs, factors, strict=True):
        prior = factor and logs["mask/prior_loss"]
        assert loss == pytest.approx(logs["mask/target_loss"] + prior, rel=1e-6)
