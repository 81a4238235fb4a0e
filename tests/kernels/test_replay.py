"""A form of call that was seen before is launched again with other addresses: the same bits, the same errors, fewer steps."""

import pytest
import torch

pytest.importorskip("triton")

from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss
from masked_loss_triton.backend import replay
from tests.support import replayed

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the handles are those of interpreted kernels"),
    pytest.mark.skipif(
        torch.__version__ < "2.6", reason="nothing is replayed: hooks of saved tensors cannot be asked for"
    ),
]


@pytest.fixture
def launched(monkeypatch):
    replay._recording.cache_clear()
    yield replayed.patch(monkeypatch)
    replay._recording.cache_clear()


def draw(shape=(2, 4, 3, 4, 6), dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def arguments(**call):
    """New tensors of one form: (pred, target, mask, keywords)."""
    call = {name: value() if callable(value) else value for name, value in call.items()}
    shape, dtype = call.pop("shape", (2, 4, 3, 4, 6)), call.pop("dtype", torch.float32)
    pred, target, mask = (call.pop(name, None) for name in ("pred", "target", "mask"))
    pred = draw(shape, dtype) if pred is None else pred
    target = draw(shape, dtype) if target is None else target
    mask = torch.rand(shape[0], *shape[2:]) if mask is None else mask
    return pred, target, mask, call


def result(pred, target, mask, call, upstream=3.0):
    """Everything that a call gives: loss, stats, gradient."""
    leaf = pred.detach().requires_grad_(call.get("grad", True))
    call = {name: value for name, value in call.items() if name != "grad"}
    found = masked_loss(leaf, target, mask, backend="triton", **call)
    loss, stats = found if call.get("return_stats") else (found, ())
    gradient = torch.autograd.grad(loss * upstream, leaf) if leaf.requires_grad else ()
    return [loss.detach(), *stats, *gradient]


FORMS = {
    "plain": {},
    "bfloat16": dict(dtype=torch.bfloat16),
    "a prior": dict(prior=draw),
    "a weight of the prior": dict(
        prior=draw, prior_weight=0.25, return_stats=True, prior_gate=lambda: torch.rand(2) > 0.3
    ),
    "weights of the prior": dict(
        prior=draw, prior_weight=lambda: torch.rand(2), config=MaskedLossConfig(per_sample=True)
    ),
    "a flow target": dict(target=lambda: FlowTarget(draw(), draw(), -1)),
    "stats": dict(return_stats=True, prior=draw),
    "gates and weighting": dict(
        prior=draw,
        prior_gate=lambda: torch.rand(2),
        mask_gate=lambda: torch.rand(2) > 0.3,
        weighting=lambda: torch.rand(2),
        loss_delta=lambda: torch.rand(2) + 0.1,
        config=MaskedLossConfig(loss_type="huber"),
    ),
    "a mask of another size": dict(mask=lambda: torch.rand(2, 1, 8, 9)),
    "a blurred mask": dict(mask=lambda: torch.rand(2, 3, 8, 12), config=MaskedLossConfig(blur_kernel_size=3)),
    "a pred with gaps": dict(pred=lambda: draw((2, 8, 3, 4, 6))[:, ::2]),
    "a pred that is a transposed view": dict(pred=lambda: draw((2, 3, 4, 4, 6)).transpose(1, 2)),
    "a pred that is expanded": dict(
        shape=(4, 2, 4, 1),
        pred=lambda: torch.randn(64).as_strided((4, 2, 4, 1), (1, 0, 16, 1)),
        mask=lambda: torch.rand(4, 4, 1),
    ),
    "images": dict(shape=(2, 4, 5, 6), mask=lambda: torch.rand(2, 5, 6)),
    "layers": dict(shape=(2, 3, 4, 5, 6), layout="layered", mask=lambda: torch.rand(2, 3, 5, 6)),
    "no gradient": dict(grad=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_second_call_of_a_form_gives_the_bits_of_the_whole_way(launched, form):
    """Tensors differ between the two, and lie elsewhere; memory that a kernel did not write is NaN."""
    first = arguments(**FORMS[form])
    result(*first)
    assert not launched
    second = arguments(**FORMS[form])
    again = result(*second)
    assert launched.count("loss_kernel") == 1 + FORMS[form].get("grad", True)
    replay._recording.cache_clear()
    whole = result(*second)
    assert len(again) == len(whole)
    for got, want in zip(again, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        assert got.stride() == want.stride()


CHANGES = {
    "another size": dict(shape=(2, 4, 3, 4, 7)),
    "another dtype": dict(dtype=torch.bfloat16),
    "another config": dict(config=MaskedLossConfig(gamma=0.7)),
    "a prior": dict(prior=draw),
    "one mask for the batch": dict(mask=lambda: torch.rand(1, 3, 4, 6)),
    "a mask that is bytes": dict(mask=lambda: torch.randint(0, 255, (2, 3, 4, 6), dtype=torch.uint8)),
    "a mask with other strides": dict(mask=lambda: torch.rand(2, 3, 6, 4).transpose(2, 3)),
    "a target off its alignment": dict(target=lambda: torch.randn(1 + 2 * 4 * 3 * 4 * 6)[1:].view(2, 4, 3, 4, 6)),
    "no gradient": dict(grad=False),
    "stats": dict(return_stats=True),
    "a weight of the prior": dict(prior=draw, prior_weight=0.25),
    "one weight for all samples": dict(prior=draw, prior_weight=lambda: torch.rand(1)),
    "weights of the config": dict(prior=draw, config=MaskedLossConfig(per_sample=True, prior_weight=(0.5, 0.25))),
    "a normalizer": dict(normalizer=7.0),
    "weighting that is copied": dict(weighting=lambda: torch.rand(4)[::2]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_of_another_form_takes_the_whole_way(launched, change):
    result(*arguments())
    other = arguments(**CHANGES[change])
    found = result(*other)
    assert launched == []
    replay._recording.cache_clear()
    for got, want in zip(found, result(*other), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_each_weight_of_the_prior_is_a_form_of_its_own_also_in_a_second_backward(launched):
    for number in (0.25, 0.25, 0.5, 0.5, 0.25):
        pred, target, mask, call = arguments(prior=draw, prior_weight=number)
        launched.clear()
        leaf = pred.requires_grad_()
        want = torch.autograd.grad(masked_loss(leaf, target, mask, backend="reference", **call), leaf)[0]
        loss = masked_loss(leaf, target, mask, backend="triton", **call)
        for retain in (True, False):  # the first takes the gradient that the forward wrote, the second computes it
            found = torch.autograd.grad(loss, leaf, retain_graph=retain)[0]
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)
    assert launched[:2] == ["weights_kernel", "loss_kernel"]


def test_two_arguments_that_are_one_tensor_are_not_recorded(launched):
    """Nobody could say which of the two a launch takes."""
    pred, target, mask, _ = arguments()
    masked_loss(pred, target, mask, prior=target, backend="triton")
    prior = draw()
    loss = masked_loss(pred, target, mask, prior=prior, backend="triton")
    torch.testing.assert_close(
        loss, masked_loss(pred, target, mask, prior=prior, backend="reference"), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("way", ["hook", "device"])
def test_launches_that_somebody_watches_or_of_another_device_take_the_whole_way(launched, monkeypatch, way):
    import triton

    call = arguments()
    result(*call)
    if way == "hook":
        monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    else:
        monkeypatch.setattr(replayed.Driver, "get_current_device", lambda self: 1)
    result(*call)
    assert launched == []


class TestBackward:
    """Of the second call of a form, as of the first (tests/test_gradient.py)."""

    @pytest.fixture
    def call(self, launched):
        result(*arguments())
        pred, target, mask, _ = arguments()
        pred.requires_grad_()
        return pred, target, mask, masked_loss(pred, target, mask, backend="triton")

    def test_twice_with_retain_graph(self, call):
        pred, target, mask, loss = call
        want = torch.autograd.grad(masked_loss(pred, target, mask, backend="reference"), pred)[0]
        for _ in range(3):
            (got,) = torch.autograd.grad(loss * 2, pred, retain_graph=True)
            torch.testing.assert_close(got, 2 * want)

    def test_an_input_that_was_changed_is_refused(self, call):
        _pred, target, _mask, loss = call
        target += 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_a_second_time_without_retain_graph_is_refused(self, call):
        _pred, _target, _mask, loss = call
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    def test_differentiating_twice_is_refused(self, call):
        pred, _target, _mask, loss = call
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(loss, pred, create_graph=True)

    def test_a_grad_output_off_its_alignment_is_copied(self, call, launched):
        pred, target, mask, loss = call
        launched.clear()
        grad_output = torch.full((2,), 2.0)[1]
        (got,) = torch.autograd.grad(loss, pred, grad_output)  # 4 bytes behind the start of its memory
        assert launched == ["loss_kernel"]
        (want,) = torch.autograd.grad(masked_loss(pred, target, mask, backend="reference"), pred)
        torch.testing.assert_close(got, 2 * want)


def test_a_grad_output_that_is_the_negative_of_what_lies_in_memory(launched):
    for _ in range(2):
        pred, target, mask, _ = arguments()
        leaf, number = pred.requires_grad_(), torch.full((), 2.0)
        (found,) = torch.autograd.grad(masked_loss(leaf, target, mask, backend="triton"), leaf, torch._neg_view(number))
        (want,) = torch.autograd.grad(masked_loss(leaf, target, mask, backend="reference"), leaf, -number)
        torch.testing.assert_close(found, want)


def test_a_wrong_argument_is_told_after_a_right_one_of_nearly_the_same_form(launched):
    pred, target, mask, _ = arguments()
    pred.requires_grad_()
    for _ in range(2):
        masked_loss(pred, target, mask, backend="triton")
    with pytest.raises(ValueError, match="target requires grad"):
        masked_loss(pred, target.clone().requires_grad_(), mask, backend="triton")
    with pytest.raises(ValueError, match="divide it by 255"):
        masked_loss(pred, target, torch.full((2, 3, 4, 5), 200.0), backend="triton")
    with pytest.raises(ValueError, match="layout must be"):
        masked_loss(pred, target, mask, backend="triton", layout=["channels_first"])


def test_forms_are_forgotten_before_they_fill_the_memory():
    replay._recording.cache_clear()
    for size in range(1, 400):
        replay.recording_of((torch.empty(1, 1, size),), "channels_first")
    assert replay._recording.cache_info().currsize == 256
    replay._recording.cache_clear()


def test_a_checkpoint_takes_the_whole_way_in_both_passes(launched):
    """It compares what the two passes save, which a call that is repeated saves in another form."""
    for shape, size in (((2, 4, 5, 6), (2, 5, 6)), ((2, 4, 3, 5, 6), (2, 1, 3, 5, 6))):
        for _ in range(3):
            leaf, target, mask = draw(shape).requires_grad_(), draw(shape), torch.rand(size)
            loss = checkpoint(
                lambda x, t, m: masked_loss(x, t, m, backend="triton"), leaf, target, mask, use_reentrant=False
            )
            (found,) = torch.autograd.grad(loss, leaf)
            expected = torch.autograd.grad(masked_loss(leaf, target, mask, backend="reference"), leaf)[0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_under_a_mode_of_fakes_nothing_is_launched(launched):
    given = arguments(shape=(2, 4, 5, 6), mask=lambda: torch.rand(2, 5, 6))
    result(*given)
    result(*given)
    assert launched
    launched.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        masked_loss(*given[:3], backend="triton")
    assert launched == []


def test_a_form_that_cannot_be_recorded_is_tried_once(launched, monkeypatch):
    tried = []
    monkeypatch.setattr(replay, "Replay", lambda *given, made=replay.Replay: tried.append(1) or made(*given))
    for _ in range(3):  # the kernels take a copy of the one number, which nobody gave
        result(*arguments(weighting=lambda: torch.rand(1)))
    assert len(tried) == 1


@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
def test_a_gradient_that_nobody_gives_is_none(launched, backend):
    class Dropped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad_output):
            return None

    for _ in range(2):
        pred, target, mask, _ = arguments()
        leaf = pred.requires_grad_()
        (Dropped.apply(masked_loss(leaf, target, mask, backend=backend)) + 0 * leaf.sum()).backward()
        assert not leaf.grad.any()
        Dropped.apply(masked_loss(leaf := pred.detach().requires_grad_(), target, mask, backend=backend)).backward()
        assert leaf.grad is None


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_is_no_tensor_is_told(launched, backend):
    with pytest.raises(TypeError, match=r"pred must be a torch\.Tensor, got NoneType"):
        masked_loss(None, draw(), torch.rand(2, 3, 4, 6), backend=backend)


def test_a_view_that_is_to_be_negated_is_negated(launched):
    pred, _, mask, _ = arguments()
    for _ in range(2):
        target = torch.complex(draw(), draw()).conj().imag
        assert target.is_neg()
        found = masked_loss(pred, target, mask, backend="triton")
        torch.testing.assert_close(found, masked_loss(pred, target, mask, backend="reference"), rtol=1e-5, atol=0)
