"""Masked training through the trainer's seams: real models, real caches with masks, both generations of the trainer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from masked_loss_triton import mask_weights
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi import schedule
from masked_loss_triton.integration.musubi.training import STATE_FILE, mask_of
from tests.integration.musubi.small_trainer import GENERATIONS, NAMES, InlineTrainer, both, same, trained, weights_of


@both
@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("scheme", ["none", "cosmap"])
def test_a_white_mask_is_the_stock_run(labs, generation, family, scheme):
    lab = labs(family, "white")
    stock = trained(generation, lab, masked=False, weighting_scheme=scheme)
    white = trained(generation, lab, "--use_mask_loss", weighting_scheme=scheme)
    off = trained(generation, lab, weighting_scheme=scheme)
    assert same(off, stock)
    assert white.losses == pytest.approx(stock.losses, rel=1e-6)
    if scheme == "none":
        assert same(white, stock)
    else:  # the weighting is multiplied in another order
        for one, two in zip(weights_of(white), weights_of(stock), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", NAMES)
def test_nothing_is_learned_outside_the_mask(labs, family):
    trainer = trained("method", labs(family), "--use_mask_loss", max_train_steps=1)
    step = trainer.output.extra["masked_loss"]
    outside = (step.mask == 0).expand_as(trainer.output.pred)
    assert outside.any()
    assert not trainer.output.pred.grad[outside].any()
    assert trainer.output.pred.grad[~outside].any()


def inline_is_method(labs, *flags, **changes):
    one = trained("method", labs("hv"), "--use_mask_loss", *flags, **changes)
    two = trained("inline", labs("hv"), "--use_mask_loss", *flags, **changes)
    assert two.losses == pytest.approx(one.losses, rel=2e-6)
    for a, b in zip(weights_of(one), weights_of(two), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    return one, two


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--loss_type", "huber"],
        ["--loss_type", "l1", "--inverted_mask_prior"],
        ["--inverted_mask_prior", "--normalize_per_sample", "--prior_decay_schedule", "cosine"],
    ],
)
def test_the_square_of_the_root_is_the_loss_for_every_type(labs, flags):
    inline_is_method(labs, *flags, weighting_scheme="cosmap")


def inline_with_target(monkeypatch, lab, target_of):
    """One step of the inline generation whose target is made from its prediction."""

    class Other(InlineTrainer):
        def predict(self, *given):
            pred, _ = super().predict(*given)
            return pred, target_of(pred.detach())

    monkeypatch.setitem(GENERATIONS, "other", Other)
    return trained("other", lab, "--use_mask_loss", max_train_steps=1)


def test_a_loss_of_0_has_gradient_0_through_its_root(labs, monkeypatch):
    trainer = inline_with_target(monkeypatch, labs("wan"), lambda pred: pred)
    assert trainer.losses == [0]
    assert all(not gradient.any() for gradient in trainer.gradients[0])


def test_a_loss_that_is_nan_stays_nan_through_its_root(labs, monkeypatch):
    trainer = inline_with_target(monkeypatch, labs("wan"), lambda pred: pred * float("nan"))
    assert np.isnan(trainer.losses[0])
    assert any(gradient.isnan().any() for gradient in trainer.gradients[0])


def test_the_adapters_options_reach_the_saved_lora(labs):
    for generation in GENERATIONS:
        trainer = trained(generation, labs("wan"), "--use_mask_loss", "--mask_gamma", 0.5, max_train_steps=1)
        assert trainer.metadata["ss_mask_gamma"] == "0.5"
        assert trainer.metadata["ss_use_mask_loss"] == "True"


def test_schedules():
    timesteps = torch.tensor([0.0, 75.0, 150.0, 300.0, 900.0])
    assert schedule.decay(timesteps, "constant", 300) is None
    torch.testing.assert_close(schedule.decay(timesteps, "linear", 300), torch.tensor([0, 0.25, 0.5, 1, 1]))
    half = 0.5 - 0.5 * np.cos(np.pi / 4)
    torch.testing.assert_close(
        schedule.decay(timesteps, "cosine", 300), torch.tensor([0, half, 0.5, 1, 1], dtype=torch.float32)
    )
    assert [schedule.warmup(step, 10, 0.4) for step in (0, 1, 2, 4, 9)] == [0, 0.25, 0.5, 1, 1]
    assert schedule.warmup(0, 10, 0) == 1


def test_an_unmasked_batch_is_the_stock_loss(labs):
    lab = labs("wan")
    stock = trained("method", lab, masked=False)
    assert same(trained("method", lab, "--use_mask_loss", "--mask_probability", 0), stock)
    some = trained("method", lab, "--use_mask_loss", "--mask_probability", 0.5, trackers=[object()], max_train_steps=8)
    assert some.logs[-1]["mask/masked_rate"] == some.masked.masked / 8
    assert 0 < some.masked.masked < 8


def test_the_log_says_what_was_done(labs):
    lab = labs("wan")
    flags = ["--use_mask_loss", "--inverted_mask_prior", "--prior_warmup_ratio", 0.5]
    logged = trained("method", lab, *flags, trackers=[object()], learning_rate=1.0)
    assert same(logged, trained("method", lab, *flags, learning_rate=1.0))
    for loss, logs in zip(logged.losses, logged.logs, strict=True):
        assert logs["mask/target_loss"] + logs.get("mask/prior_loss", 0) == pytest.approx(loss, rel=1e-6)
    assert [logs["mask/prior_factor"] for logs in logged.logs] == [0, 0.25, 0.5, 0.5]
    assert [logs["mask/teacher_rate"] for logs in logged.logs] == [0, 0.5, 2 / 3, 0.75]
    assert "mask/drift_outside" not in logged.logs[0]
    assert [name for name in logged.logs[0] if "dataset" in name] == ["mask/coverage_dataset_0"]
    assert "mask/coverage_dataset_0" not in logged.logs[1]
    step, logs = logged.output.extra["masked_loss"], logged.logs[-1]
    w, v = mask_weights(step.mask, logged.masked.config, shape=(2, *step.positions))
    m = step.mask.double().expand_as(logged.output.pred)
    for name, other in (("error", logged.output.target), ("drift", step.prior)):
        squares = (logged.output.pred.detach().double() - other.double()) ** 2
        for side, part in (("inside", m), ("outside", 1 - m)):
            assert logs[f"mask/{name}_{side}"] == pytest.approx(float((part * squares).sum() / part.sum()), rel=1e-5)
    assert logs["mask/drift_outside"] > 0
    assert logs["mask/coverage"] == pytest.approx(float(m.mean()), rel=1e-5)
    assert logs["mask/weight"] == pytest.approx(float(w.mean()), rel=1e-6)
    assert logs["mask/prior_region"] == pytest.approx(float(v.mean()), rel=1e-6)


def test_what_a_batch_does_not_have_is_not_logged(labs):
    white = trained("method", labs("wan", "white"), "--use_mask_loss", trackers=[object()], max_train_steps=1)
    assert "mask/error_inside" in white.logs[0]
    assert "mask/error_outside" not in white.logs[0]
    unmasked = ["--use_mask_loss", "--mask_probability", 0]
    off = trained("method", labs("wan"), *unmasked, trackers=[object()], max_train_steps=1)
    assert set(off.logs[0]) == {"loss/current", "mask/target_loss", "mask/coverage_dataset_0", "mask/masked_rate"}


@both
def test_resumed_is_uninterrupted(labs, generation, tmp_path):
    lab = labs("wan", "disc", "ab")
    flags = ["--use_mask_loss", "--inverted_mask_prior", "--prior_teacher", "ema", "--prior_ema_decay", 0.5]
    flags += ["--mask_probability", 0.6, "--prior_warmup_ratio", 0.5]
    timesteps, noise = (
        (lambda batch: [400.0, 800.0]),
        (lambda batch: torch.linspace(-1, 1, 8192).reshape(2, 16, 1, 16, 16)),
    )
    given = {"timesteps": timesteps, "noise": noise, "state": str(tmp_path / "state")}
    whole = trained(generation, lab, *flags, max_train_steps=8, save_at=3, **given)
    rest = trained(generation, lab, *flags, max_train_steps=8, resume=given["state"], **given)
    assert rest.losses[:5] == whole.losses[3:]
    assert rest.masked.step == whole.masked.step + 3
    (tmp_path / "state" / STATE_FILE).unlink()
    anew = trained(generation, lab, *flags, max_train_steps=5, resume=given["state"], **given)
    assert anew.losses != whole.losses[3:]


def test_states_that_do_not_fit(labs, tmp_path, capsys):
    lab = labs("wan")
    state = str(tmp_path / "state")
    trained("method", lab, "--use_mask_loss", "--inverted_mask_prior", save_at=1, state=state)
    with pytest.raises(UserError, match="holds no teacher"):
        trained("method", lab, "--use_mask_loss", "--inverted_mask_prior", "--prior_teacher", "ema", resume=state)
    (tmp_path / "state" / STATE_FILE).write_bytes(b"cut")
    with pytest.raises(UserError, match=f"{STATE_FILE} is damaged"):
        trained("method", lab, "--use_mask_loss", resume=state)
    save_file({}, tmp_path / "state" / STATE_FILE, metadata={"counters": "{}"})
    with pytest.raises(UserError, match=f"{STATE_FILE} is damaged"):
        trained("method", lab, "--use_mask_loss", resume=state)
    (tmp_path / "state" / STATE_FILE).unlink()
    trained("method", lab, "--use_mask_loss", resume=state)
    assert "saved without masks" in capsys.readouterr().out
    trained("method", lab, masked=False, resume=state)  # and the stock trainer reads our states


def test_masks_of_a_batch():
    latents = torch.zeros(3, 16, 1, 8, 8)
    good = torch.rand(3, 1, 1, 8, 8)
    assert torch.equal(mask_of({"mask_weights_1x8x8": good}, latents, False), good)
    layered = torch.rand(1, 1, 3, 8, 8)
    dropped = mask_of({"mask_weights_3x8x8": layered}, torch.zeros(1, 16, 3, 8, 8), True)
    assert torch.equal(dropped, layered[:, :, 1:])
    with pytest.raises(UserError, match="no mask weights: run masked-loss cache"):
        mask_of({"latents": latents}, latents, False)
    # One sample's mask would otherwise spread over the whole batch.
    with pytest.raises(UserError, match=r"is \(1, 1, 1, 8, 8\), its latents need \(3, 1, 1, 8, 8\)"):
        mask_of({"mask_weights_1x8x8": good[:1]}, latents, False)
    with pytest.raises(
        UserError, match=r"mask_weights_1x8x8 is floating with a largest value of 255.*run masked-loss cache"
    ):
        mask_of({"mask_weights_1x8x8": good.round() * 255}, latents, False)
    with pytest.raises(UserError, match="several masks"):
        mask_of({"mask_weights_1x8x8": good, "mask_weights_1x4x4": good}, latents, False)
