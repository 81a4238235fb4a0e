"""grad_output is foreseen: the forward multiplies by what the last backward was given, and the backward finds its work done."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.backend import replay
from masked_loss_triton.kernels import upstream

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def nothing_is_known():
    upstream._slots.cache_clear()
    replay._recording.cache_clear()  # calls that are made again know where their number lies


def a_call(device, dtype=torch.float32, config=None):
    """(loss, pred) of data that are always the same."""
    generator = torch.Generator().manual_seed(1)
    pred, target = (torch.randn(2, 4, 3, 4, 6, generator=generator).to(device, dtype) for _ in range(2))
    mask = torch.rand(2, 3, 4, 6, generator=generator).to(device)
    return masked_loss(pred.requires_grad_(), target, mask, config, backend="triton"), pred


def gradients(device, grad_output, dtype=torch.float32, config=None):
    """(what the forward has written, what the backward gives)."""
    loss, pred = a_call(device, dtype, config)
    written = loss.grad_fn.gradient[0].clone()
    return written, torch.autograd.grad(loss * grad_output, pred)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_does_not_change_is_foreseen_and_what_changes_is_computed_to_the_same_bits(device, dtype):
    computed = {}
    for grad_output in (1.0, 0.25, 0.3, 3e4):
        for turn in range(3):
            written, given = gradients(device, grad_output, dtype)
            assert torch.equal(written, given) == (turn > 0 or grad_output == 1.0)
            if turn == 0:
                computed[grad_output] = given
            assert torch.equal(given, computed[grad_output])
    assert torch.equal(gradients(device, 1.0, dtype)[1], computed[1.0])


@pytest.mark.parametrize("number", [0.5, 0.3])
def test_the_backward_writes_the_gradient_only_where_it_was_not_foreseen(device, number):
    gradients(device, 0.5)
    loss, pred = a_call(device)
    loss.grad_fn.gradient[0].fill_(7.0)
    (found,) = torch.autograd.grad(loss * number, pred)
    assert (found == 7.0).all() if number == 0.5 else not (found == 7.0).any()


def test_a_step_of_nan_is_forgotten(device):
    _, want = gradients(device, 0.5)
    assert gradients(device, float("nan"))[1].isnan().all()
    written, found = gradients(device, 0.5)
    assert written.isnan().all()
    assert torch.equal(found, want)


def test_losses_of_two_configs_do_not_disturb_each_other(device):
    configs = [MaskedLossConfig(gamma=1 + n / 8) for n in range(16)]
    first = configs[0]
    second = next(x for x in configs if (hash(x) - hash(first)) % upstream.SLOTS)
    for _ in range(2):
        found = [gradients(device, number, config=config) for number, config in ((0.25, first), (4.0, second))]
    for written, given in found:
        assert torch.equal(written, given)


def test_a_second_backward_and_another_number_in_it(device):
    gradients(device, 0.5)
    loss, pred = a_call(device)
    want = {number: gradients(device, number)[1] for number in (0.5, 2.0)}
    for number in (0.5, 2.0, 0.5, 0.5):
        (found,) = torch.autograd.grad(loss * number, pred, retain_graph=True)
        assert torch.equal(found, want[number])


def test_what_another_backward_was_given_meanwhile_is_not_taken_for_what_the_forward_expected(device):
    """On another stream, say: the call has a copy of its own, made before the first program of its loss starts."""
    _, want = gradients(device, 0.25)
    gradients(device, 0.5)
    loss, pred = a_call(device)
    last = upstream.last_grad_output(pred.device, MaskedLossConfig())
    assert last[0] == 0.5
    last.fill_(0.25)
    (found,) = torch.autograd.grad(loss * 0.25, pred)
    assert torch.equal(found, want)


@pytest.mark.parametrize("prior", [False, True], ids=["no prior", "a prior"])
def test_what_was_saved_may_come_back_elsewhere_and_without_its_gaps(device, prior):
    """As from `save_on_cpu(pin_memory=True)`. Another layout is another grid of the backward, with other partial sums."""
    pred, target, other = (torch.randn(1, 16, 1, 16, 64, device=device).bfloat16()[..., :32] for _ in range(3))
    mask, call = torch.rand(1, 16, 32, device=device), dict(prior=other) if prior else {}
    compact = dict(memory_format=torch.contiguous_format)
    for number in (1.0, 0.5, 0.5):
        leaf, exact = pred.detach().requires_grad_(), pred.double().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.clone(**compact)):
            loss = masked_loss(leaf, target, mask, backend="triton", **call)
        found = [torch.autograd.grad(loss * number, leaf, retain_graph=True)[0] for _ in range(2)]
        double = {name: x.double() for name, x in call.items()}
        (want,) = torch.autograd.grad(masked_loss(exact, target.double(), mask, **double) * number, exact)
        for gradient in found:
            torch.testing.assert_close(gradient.double(), want, rtol=2**-7, atol=1e-9)


def test_weights_may_come_back_with_other_strides(device):
    """The mask is at another size, so that the loss kernel reads weights from memory, as one run."""
    pred, target = torch.randn(2, 4, 3, 4, 6, device=device), torch.zeros(2, 4, 3, 4, 6, device=device)
    leaf, mask = pred.requires_grad_(), torch.rand(2, 3, 8, 12, device=device)

    def strided(x):
        return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, strided):
        loss = masked_loss(leaf, target, mask, backend="triton")
    (found,) = torch.autograd.grad(loss * 3, leaf)
    (want,) = torch.autograd.grad(masked_loss(leaf, target, mask, backend="reference") * 3, leaf)
    torch.testing.assert_close(found, want)


def test_checkpoints_of_several_losses_while_the_scale_changes(device):
    """The second forward of each expects what the backward before it was given; the gradient is that of the first forward."""
    pred, target, mask = (
        a_call(device)[1],
        torch.zeros(2, 4, 3, 4, 6, device=device),
        torch.ones(2, 3, 4, 6, device=device),
    )

    def loss_of(x):
        return masked_loss(x, target, mask, backend="triton")

    (one,) = torch.autograd.grad(masked_loss(pred, target, mask, backend="reference"), pred)
    for scale in (1.0, 2.0, 0.25):
        leaves = [pred.detach().requires_grad_() for _ in range(3)]
        found = torch.autograd.grad(sum(checkpoint(loss_of, x, use_reentrant=False) for x in leaves) * scale, leaves)
        for gradient in found:
            torch.testing.assert_close(gradient, one * scale)


def test_a_first_call_under_a_mode_of_fakes_spoils_no_other(device):
    with FakeTensorMode(allow_non_fake_inputs=True):
        upstream.last_grad_output(torch.device(device), MaskedLossConfig())
    _, given = gradients(device, 0.5)
    assert given.isfinite().all()
