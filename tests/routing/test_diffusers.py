"""Routing through the real transformers of diffusers, tiny."""

import contextlib

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss
from masked_loss_triton.routing import Kept, routed
from masked_loss_triton.routing.diffusers import layout_of
from masked_loss_triton.routing.lanes import rerouted
from tests.routing.support import TOKENS, Case, assert_equal_up_to, in_float64, oracle, subjects

NAMES = ("wan", "hv", "qwen")
BLOCKS = {"wan": (1, 2), "hv": (1, 6), "qwen": (1, 2)}


def kept_tokens(case, count=TOKENS // 2):
    rows = 1 if layout_of(case.model).shared else 2
    orders = [torch.randperm(TOKENS, generator=torch.Generator().manual_seed(row)) for row in range(rows)]
    return Kept(torch.stack([order[:count].sort().values for order in orders]), None, TOKENS, None)


def through(case, kept, blocks=None):
    return lambda: rerouted(case.model, layout_of(case.model), kept, blocks or BLOCKS[case.name])


def weight_of(case):
    return torch.rand(case.noisy.shape, generator=torch.Generator().manual_seed(5)).to(case.dtype)


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])


def hooks_of(model):
    return sum(len(block._forward_hooks) + len(block._forward_pre_hooks) for block in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_all_tokens_through_the_hooks_is_the_model_itself_bit_for_bit(name):
    case = Case(name)
    assert_same(case.run(weight_of(case), through(case, kept_tokens(case, TOKENS))), case.run(weight_of(case)))
    assert hooks_of(case.model) == 0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", NAMES)
def test_half_the_tokens_equal_the_oracle(name, dtype, tolerance):
    with in_float64() if dtype == torch.float64 else contextlib.nullcontext():
        case = Case(name, dtype=dtype)
        kept = kept_tokens(case)
        ours = case.run(weight_of(case), through(case, kept))
        expected = case.run(
            weight_of(case), lambda: oracle(case.lanes, kept.index, BLOCKS[name], text_first=name == "qwen")
        )
        assert_equal_up_to(tolerance, ours, expected)
        assert (ours[0] - case.run(weight_of(case))[0]).abs().max() > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_changes_nothing(name):
    """The backward, which computes the blocks again, comes when the hooks are gone."""
    case = Case(name)
    kept = kept_tokens(case)
    ours = case.run(weight_of(case), through(case, kept))
    case.model.enable_gradient_checkpointing()
    assert_same(case.run(weight_of(case), through(case, kept)), ours)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
def test_blocks_that_are_compiled_compute_the_same():
    case = Case("wan")
    kept = kept_tokens(case)
    ours = case.run(weight_of(case), through(case, kept))
    blocks = case.model.blocks
    for number, block in enumerate(blocks):
        blocks[number] = torch.compile(block, backend="eager")
    compiled = case.run(weight_of(case), through(case, kept))
    assert_same(compiled, (ours[0], {name: ours[1][name.replace("._orig_mod", "")] for name in compiled[1]}))


@pytest.mark.parametrize("name", NAMES)
def test_nan_in_dropped_tokens_reaches_nothing_that_is_kept(name):
    """Planted at the entry of the routed blocks, which go to the model's end, where tokens are on their own again."""
    case = Case(name)
    last = sum(len(blocks) for blocks, _ in case.lanes) - 1
    weights = subjects(case.shape)
    entry = case.lanes[0][0][1]

    def plant(block, args, kwargs):
        x = kwargs["hidden_states"] if kwargs else args[0]
        token = torch.nn.functional.max_pool3d(positions.float().unsqueeze(1), (1, 2, 2)).flatten(1).bool()
        x = torch.where(token.unsqueeze(-1), x, torch.full_like(x, float("nan")))
        return ((), {**kwargs, "hidden_states": x}) if kwargs else ((x, *args[1:]), {})

    positions = torch.ones(1)
    entry.register_forward_pre_hook(plant, with_kwargs=True)
    with routed(case.model, weights, blocks=(1, last)) as step:
        positions = step.kept.positions
        pred = case.predict()
    on = positions.unsqueeze(1).expand_as(pred)
    assert pred[on].isfinite().all()
    assert pred[~on].isnan().all()
    pred[on].square().sum().backward()
    inside = [value.grad for value in entry.parameters() if value.grad is not None]
    assert inside
    assert all(value.isfinite().all() for value in inside)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_the_loss_is_0_at_dropped_tokens(name, prior):
    case = Case(name)
    config = MaskedLossConfig(min_weight=0.1)
    teacher = torch.randn_like(case.noisy) if prior else None
    with routed(case.model, subjects(case.shape), 0.5, config=config, has_prior=prior) as step:
        pred = case.predict()
    pred.retain_grad()
    step.loss(pred, FlowTarget(torch.randn_like(pred), case.noisy), prior=teacher).backward()
    on = step.kept.positions.unsqueeze(1).expand_as(pred)
    assert on.float().mean() == 0.5
    assert (pred.grad[~on] == 0).all()
    assert (pred.grad[on] != 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_is_the_unrouted_loss_bit_for_bit(name):
    case = Case(name)
    mask = subjects(case.shape)
    config = MaskedLossConfig(gamma=0.7, min_weight=0.05, blur_kernel_size=3)
    target = FlowTarget(torch.randn_like(case.noisy), case.noisy)
    with routed(case.model, mask, 1.0, config=config, has_prior=True) as step:
        assert hooks_of(case.model) == 0
        pred = case.predict()
    assert torch.equal(pred, case.predict())
    prior = torch.zeros_like(pred)
    assert torch.equal(step.loss(pred, target, prior=prior), masked_loss(pred, target, mask, config, prior=prior))


def test_a_step_that_fails_leaves_no_hooks_and_nothing_else():
    case = Case("wan")
    case.model.enable_gradient_checkpointing()
    checkpoint = case.model._gradient_checkpointing_func

    def fails(*_):
        raise RuntimeError("in the middle")

    failing = case.model.blocks[2].register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="in the middle"), routed(case.model, subjects(case.shape)):
        case.predict()
    failing.remove()
    assert hooks_of(case.model) == 0
    assert case.model._gradient_checkpointing_func is checkpoint
    case.predict()


def test_what_cannot_be_routed_is_refused_with_the_reason():
    wan, mask = Case("wan").model, torch.ones(2, 1, 3, 8, 12)
    refused = [
        ((torch.nn.Linear(1, 1), mask), {}, "Linear cannot be routed"),
        ((wan, mask), {"blocks": (2, 9)}, "the model has blocks 0 to 3"),
        ((wan, None), {}, "shape must be"),
        ((wan, mask), {"config": MaskedLossConfig(area_scale_beta=1.0)}, "area_scale_beta"),
    ]
    for given, named, reason in refused:
        with pytest.raises(ValueError, match=reason), routed(*given, **named):
            pass
    wan.blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match="compiled in place"), routed(wan, mask):
        pass
    assert hooks_of(wan) == 0
    replaced = Case("hv", image_condition_type="token_replace").model
    with pytest.raises(ValueError, match="token_replace"), routed(replaced, mask):
        pass


def test_a_mask_of_another_size_than_the_latents_needs_a_shape():
    case = Case("wan")
    mask = subjects(case.shape).repeat_interleave(8, 3).repeat_interleave(8, 4)
    with pytest.raises(ValueError, match="latents' size"), routed(case.model, mask):
        case.predict()
    with routed(case.model, mask, shape=case.shape) as step:
        case.predict()
    assert step.kept.positions.shape == case.shape


@pytest.mark.parametrize("name", NAMES)
def test_half_the_tokens_take_at_most_six_tenths_of_the_operations(name):
    """Forward and backward of ten blocks of which eight are routed, 3,072 tokens of 384 channels, counted on tensors without
    content; and what the log says is saved."""
    rope = (
        {"axes_dims_rope" if name == "qwen" else "rope_axes_dim": (16, 16, 32)} if name != "wan" else {"ffn_dim": 1536}
    )
    case = Case(name, 5 if name == "hv" else 10, "meta", num_attention_heads=6, attention_head_dim=64, **rope)
    frames, height, width = case.shape[1:]
    case.resize(frames, height * 8, width * 16 // 3)
    mask = torch.zeros(case.shape, device="meta").unsqueeze(1)
    counts = []
    for keep in (1.0, 0.5, 0.25):
        operations = FlopCounterMode(display=False)
        with sdpa_kernel(SDPBackend.MATH), operations, routed(case.model, mask, keep) as step:
            case.predict().square().mean().backward()
        counts.append(operations.get_total_flops())
    half, quarter = counts[1] / counts[0], counts[2] / counts[0]
    assert half <= 0.6
    assert quarter <= 0.45
    assert layout_of(case.model).saved(step.kept, None) == pytest.approx(1 - quarter, abs=0.06)
