"""Routing in a trainer with the seams of the real ones, around diffusers' models. tests/lab has the real ones."""

from __future__ import annotations

import argparse
import random
from unittest import mock

import pytest
import torch

from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi import routing
from masked_loss_triton.integration.musubi.options import MaskOptions
from masked_loss_triton.integration.musubi.routing import models
from masked_loss_triton.routing import Kept, Router, diffusers
from tests.integration.musubi import small_trainer
from tests.integration.musubi.small_trainer import NAMES, arguments, by_item, trained
from tests.support.caches import caches

HALF = ("--use_mask_loss", "--mask_routing", "0.5", "--mask_routing_blocks", "0-1")
LAYOUT_OF = models.layout_of


@pytest.fixture(autouse=True)
def _diffusers_models(monkeypatch):
    """The small trainer's models are those of diffusers."""
    monkeypatch.setattr(routing, "layout_of", diffusers.layout_of)
    monkeypatch.setattr(models, "layout_of", diffusers.layout_of)
    monkeypatch.setattr(small_trainer.sai_model_spec, "build_metadata", small_trainer.sai_model_spec.build_metadata)


@pytest.fixture(scope="module")
def labs(tmp_path_factory):
    """Four pictures of 64 tokens for each family; "one" is a single one."""
    made = {name: caches(tmp_path_factory.mktemp(name), name, stems="abce") for name in NAMES}
    return {**made, "one": caches(tmp_path_factory.mktemp("one"), "wan", stems="b")}


def assert_same(one, other):
    assert one.losses == other.losses
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("generation", ["method", "inline"])
@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_are_the_unrouted_run_and_half_are_not(labs, generation, name):
    lab = labs[name]
    plain = trained(generation, lab, "--use_mask_loss")
    assert_same(trained(generation, lab, "--use_mask_loss", "--mask_routing", "1"), plain)
    with mock.patch("masked_loss_triton.routing.Router.count", lambda router, tokens: tokens):
        assert_same(trained(generation, lab, *HALF), plain)
    half = trained(generation, lab, *HALF)
    assert half.losses != plain.losses
    # The noise of the steps after it: routing draws from a generator of its own.
    assert all(torch.equal(one, other) for one, other in zip(half.draws, plain.draws, strict=True))


def hooks_of(model):
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.mark.parametrize("across", ["rank", "accumulation"])
def test_denominators_of_accumulated_batches_count_what_is_left(labs, across):
    given = {"gradient_accumulation_steps": 2, "batch_size": 1}
    flags = ("--use_mask_loss", "--mask_normalize_across", across)
    plain = trained("method", labs["wan"], *flags, **given)
    with mock.patch("masked_loss_triton.routing.Router.count", lambda router, tokens: tokens):
        assert_same(trained("method", labs["wan"], *flags, *HALF[1:], **given), plain)


def test_micro_batches_are_the_large_batch_with_the_same_tokens(labs):
    """Where every picture keeps the half that it would keep alone: the denominator is of what is left."""
    choose = Router.choose

    def alike(self, weights, patch, draw, **named):
        kept = [choose(self, one[None], patch, random.Random(0), **named) for one in weights]
        index, positions = (torch.cat([getattr(one, name) for one in kept]) for name in ("index", "positions"))
        return Kept(index, positions, kept[0].tokens, kept[0].weighted)

    given = {"max_train_steps": 1, **by_item()}
    split = {"batch_size": 1, "gradient_accumulation_steps": 2}
    with mock.patch.object(Router, "choose", alike):
        whole = trained("method", labs["wan"], *HALF, **given).gradients[0]
        shared = trained("method", labs["wan"], *HALF, "--mask_normalize_across", "accumulation", **split, **given)
        alone = trained("method", labs["wan"], *HALF, **split, **given).gradients[0]
    largest = max(float(value.abs().max()) for value in whole)
    differences = [
        max(float((a - b).abs().max()) for a, b in zip(whole, parts, strict=True)) / largest
        for parts in (shared.gradients[0], alone)
    ]
    assert differences[0] < 1e-5
    assert differences[1] > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_sees_everything_and_the_student_half(labs, name):
    """Counted at the routed blocks: tokens of the pass without gradient, and of the one with it."""
    seen = []
    start = routing.Routing.__init__

    def start_and_watch(self, options, model, seed):
        start(self, options, model, seed)
        self.layout.lanes[0].blocks[0].forward = counted(self.layout.lanes[0].blocks[0].forward)

    def counted(forward):
        def count(*args, **kwargs):
            seen.append((torch.is_grad_enabled(), (kwargs["hidden_states"] if kwargs else args[0]).shape[1]))
            return forward(*args, **kwargs)

        return count

    with mock.patch.object(routing.Routing, "__init__", start_and_watch):
        trainer = trained("method", labs[name], *HALF, "--inverted_mask_prior", batch_size=1)
    assert {grad for grad, _ in seen} == {True, False}
    assert {tokens for grad, tokens in seen if not grad} == {64}
    assert {tokens for grad, tokens in seen if grad} == {32}
    assert hooks_of(trainer.transformer) == 0
    seen.clear()
    # Samples are drawn with the model itself, and validation calls this without a gradient.
    args = arguments(labs[name].toml, *HALF)
    batch = trainer.batches(args)[0]
    given = (batch["latents"], torch.full((len(batch["latents"]),), 500.0))
    with torch.no_grad():
        trainer.call_dit(args, None, trainer.transformer, given[0], batch, *given[:1] * 2, given[1], torch.float32)
    assert [tokens for _, tokens in seen] == [64]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_fails_in_the_middle_leaves_no_hooks(labs, name):
    """In the second step, in a routed block."""
    made, models_of_runs = routing.Routing.__init__, []

    def start_and_break(self, options, model, seed):
        made(self, options, model, seed)
        models_of_runs.append(model)
        block = self.layout.lanes[-1].blocks[-1]
        forward, calls = block.forward, iter((1, 0))
        block.forward = lambda *args, **kwargs: 1 / next(calls) and forward(*args, **kwargs)

    with mock.patch.object(routing.Routing, "__init__", start_and_break), pytest.raises(ZeroDivisionError):
        trained("method", labs[name], *HALF)
    assert hooks_of(models_of_runs[0]) == 0


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_at_dropped_tokens_is_0(labs, name, prior):
    flags = ("--inverted_mask_prior", "--mask_min_weight", "0.1") if prior else ()
    trainer = trained("method", labs[name], *HALF, *flags, batch_size=1)
    step = trainer.output.extra["masked_loss"]
    gradient = trainer.output.pred.grad
    on = step.routed.kept.positions.unsqueeze(1).expand_as(gradient)
    assert 0 < on.float().mean() < 0.6
    assert (gradient[~on] == 0).all()
    weighted = step.routed.target.unsqueeze(1).expand_as(gradient) > 0
    assert (gradient[weighted] != 0).float().mean() > 0.99


def test_after_its_share_of_the_steps_every_token_is_computed(labs):
    flags = [*HALF, "--mask_routing_until", "0.5"]
    half = trained("method", labs["wan"], *flags, trackers=["log"])
    assert [log["mask/routing_kept"] for log in half.logs] == [0.5, 0.5, 1.0, 1.0]
    assert [log["mask/routing_saved"] > 0.3 for log in half.logs] == [True, True, False, False]
    assert 0 < half.logs[0]["mask/routing_weighted"] < 1


def test_resumed_is_uninterrupted(labs, tmp_path):
    """One picture with noise of its own: the losses differ by the tokens that each step keeps."""
    given = {"batch_size": 1, **by_item()}
    flags = [*HALF, "--mask_routing_background", "0.75"]
    whole = trained("method", labs["one"], *flags, save_at=2, state=tmp_path / "state", **given)
    given.update(trackers=["log"])
    resumed = {**given, "resume": str(tmp_path / "state"), "max_train_steps": 4}  # four more, as the trainers count
    rest = trained("method", labs["one"], *flags, **resumed)
    assert rest.losses[:2] == whole.losses[2:]
    assert [log["mask/routing_kept"] for log in rest.logs] == [0.5] * 4
    until = trained("method", labs["one"], *flags, "--mask_routing_until", "0.75", **resumed)
    assert [log["mask/routing_kept"] for log in until.logs] == [0.5, 0.5, 0.5, 1.0]  # of six in all
    anew = trained("method", labs["one"], *flags, **given)
    assert anew.losses == whole.losses


def test_steps_draw_other_tokens_and_the_same_step_the_same(labs):
    model = trained("method", labs["wan"], "--use_mask_loss").transformer
    mask = torch.zeros(1, 1, 1, 16, 16)
    options = MaskOptions(use_mask_loss=True, mask_routing=0.5, mask_routing_blocks="0-1")
    given = {"has_prior": False, "progress": 0.0}

    def index(step, rank=0, seed=7):
        run = routing.Routing(options, model, seed)
        return run.weights(mask, MaskedLossConfig(), (1, 1, 16, 16), None, step=step, rank=rank, **given).kept.index

    assert torch.equal(index(3), index(3))
    for other in (index(4), index(3, rank=1), index(3, seed=8)):
        assert not torch.equal(index(3), other)


GATED = ("--use_mask_loss", "--mask_cross_attention")


def test_cross_attention_is_gated_by_the_mask_and_exact_where_it_is_white(labs, tmp_path):
    white = caches(tmp_path, "wan", "white", stems="abce")
    assert_same(trained("method", white, *GATED), trained("method", white, "--use_mask_loss"))
    plain, gated = trained("method", labs["wan"], "--use_mask_loss"), trained("method", labs["wan"], *GATED)
    assert plain.losses[0] != gated.losses[0]
    with mock.patch("masked_loss_triton.routing.Router.count", lambda router, tokens: tokens):
        assert_same(trained("method", labs["wan"], *GATED, *HALF[1:]), gated)
    assert trained("method", labs["wan"], *GATED, *HALF[1:]).losses != gated.losses


def test_what_the_gate_lets_through_is_the_weight_of_the_token(labs):
    """The text's part of the first block: 0 outside, as it is where the weight is 1; nothing is gated without a gradient."""
    trainer = trained("method", labs["wan"], *GATED, batch_size=1)
    step = trainer.output.extra["masked_loss"]
    attention = trainer.transformer.blocks[0].attn2
    x = torch.randn(1, 64, attention.inner_dim)
    text = torch.randn(1, 5, attention.inner_dim)
    with torch.no_grad():
        every = attention(x, text)
    gated = attention(x, text).detach()
    weight = torch.nn.functional.max_pool3d(step.mask.float(), (1, 2, 2)).flatten(1)
    assert (weight == 0).any()
    assert (weight == 1).any()
    assert (gated[weight == 0] == 0).all()
    assert (every[weight == 0] != 0).all()
    assert torch.equal(gated[weight == 1], every[weight == 1])


def test_families_that_cannot_are_refused_before_a_model_is_loaded():
    routing.check_routing(MaskOptions(use_mask_loss=True, mask_routing=0.5), "qie", None)
    with pytest.raises(UserError, match="--mask_routing can be had for wan, hv, qwen, not for hv15"):
        routing.check_routing(MaskOptions(use_mask_loss=True, mask_routing=0.5), "hv15", None)
    with pytest.raises(
        UserError, match="--mask_cross_attention needs a cross-attention to the text, which qwen has not"
    ):
        routing.check_routing(MaskOptions(use_mask_loss=True, mask_cross_attention=True), "qi", None)
    gated = MaskOptions(use_mask_loss=True, mask_cross_attention=True)
    with pytest.raises(UserError, match="--mask_cross_attention cannot be had with --compile: drop one"):
        routing.check_routing(gated, "wan", argparse.Namespace(compile=True))
    other = argparse.Namespace(compile=True, rope_func="comfy")
    with pytest.raises(UserError, match="--mask_routing needs --rope_func default, not comfy: drop one"):
        routing.check_routing(MaskOptions(use_mask_loss=True, mask_routing=0.5), "wan", other)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"mask_routing": 0.5, "mask_area_scale_beta": 1.0}, "--mask_area_scale_beta scales by the whole mask"),
        ({"mask_cross_attention": True, "inverted_mask_prior": True}, "--mask_cross_attention silences the text"),
        (
            {"mask_routing": 0.5, "mask_normalize_across": "world", "inverted_mask_prior": True},
            "--mask_normalize_across world with --mask_routing",
        ),
    ],
)
def test_flags_that_exclude_each_other_are_named(bad, message):
    with pytest.raises(UserError, match=message):
        MaskOptions(use_mask_loss=True, **bad)


def test_flags_that_do_nothing_are_told():
    idle = MaskOptions(use_mask_loss=True, mask_routing_grow=2).idle(1, 1)
    assert idle == ["--mask_routing_grow does nothing without --mask_routing below 1"]


def test_blocks_and_models_that_are_not_there_are_refused(labs):
    flags = [*HALF[:3], "--mask_routing_blocks", "1-7"]
    with pytest.raises(
        UserError, match="--mask_routing_blocks: blocks 1-7 cannot be routed: the model has blocks 0 to 1"
    ):
        trained("method", labs["wan"], *flags)
    with pytest.raises(UserError, match="not Linear"):
        LAYOUT_OF(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("dropped", [0, 5])
def test_the_ends_of_samples_move_as_the_trainer_counts_them(dropped):
    """hunyuan_model/attention.py get_cu_seqlens: 0, then where each sample's words and its padding end."""
    words, padded, image = torch.tensor([3, 7, 1]), 7, 20

    def ends(image):
        found = [0]
        for sample, count in enumerate(words.tolist()):
            found += [sample * (image + padded) + image + count, (sample + 1) * (image + padded)]
        return torch.tensor(found, dtype=torch.int32)

    moved = models._earlier(ends(image), dropped)
    assert moved.dtype == torch.int32
    assert torch.equal(moved, ends(image - dropped))
