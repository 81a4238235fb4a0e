"""Every combination of options: the torch backend and the Triton kernels give the numbers of the float64 reference."""

from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import Phase, given, settings

from masked_loss_triton import MaskedLossConfig, MaskedLossStats, masked_loss
from masked_loss_triton.backend import closed_form
from tests.support.accuracy import assert_gradient_close, assert_loss_close, double, reference
from tests.support.strategies import calls, on


def run(backend, device, pred, target, mask, config, grad_output, call):
    pred = on(device, pred.detach()).requires_grad_()
    call = {name: on(device, value) for name, value in call.items()}
    loss, stats = masked_loss(
        pred, on(device, target), on(device, mask), config, **call, backend=backend, return_stats=True
    )
    (loss * grad_output).backward()
    return loss.detach().cpu(), MaskedLossStats._make(x.cpu() for x in stats), pred.grad.cpu()


def check(backend, device, drawn, grad_output):
    pred, target, mask, config, call = drawn
    wanted_loss, wanted_stats, wanted_gradient, bound = reference(pred, target, mask, config, grad_output, **call)
    loss, stats, gradient = run(backend, device, pred, target, mask, config, grad_output, call)
    assert gradient.dtype == pred.dtype
    assert_gradient_close(gradient, wanted_gradient, bound, truncates=backend == "triton" and device == "cpu")
    # Where weights nearly cancel, the loss is as uncertain as its gradient: sum over the elements of what is allowed there.
    noise = (bound * (pred.double() - pred.double().mean()).abs().clamp_min(1)).sum() / abs(grad_output)
    assert abs(loss.double() - wanted_loss) <= 1e-6 * abs(wanted_loss) + noise + 1e-30
    largest = max(float((pred.detach().double() - double(x)).abs().max()) for x in (target, call.get("prior", pred)))
    for name, got, want in zip(stats._fields, stats, wanted_stats, strict=True):
        tolerance = 4e-6
        if name.endswith("side"):  # the mask, or 1 - m, is noise where it is nearly 0 everywhere
            mean = wanted_stats.raw_mean if name.endswith("_inside") else 1 - wanted_stats.raw_mean
            tolerance += float(6e-7 / max(mean, 1e-12)) * max(largest, largest**2)
        if name == "mask_max" and backend == "triton" and config.resample != "area":
            assert got <= want * (1 + 1e-7)  # of the values that are read
        elif name not in ("loss", "target_term", "prior_term", "prior_share"):
            torch.testing.assert_close(
                got.double(), want.double(), atol=tolerance, rtol=4e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    torch.testing.assert_close(stats.loss, loss)
    torch.testing.assert_close(stats.target_term + stats.prior_term, loss, rtol=1e-5, atol=1e-7)


upstream = st.sampled_from([1.0, -2.5, 0.3, 1024.0])


@given(drawn=calls(), grad_output=upstream, block=st.sampled_from([closed_form.CPU_BLOCK, 100, 7]))
@settings(max_examples=250)
def test_the_torch_backend_equals_the_reference(device, drawn, grad_output, block):
    """Also cut into blocks, as larger tensors are."""
    with mock.patch.object(closed_form, "CPU_BLOCK", block), mock.patch.object(closed_form, "DEVICE_BLOCK", block):
        check("torch", device, drawn, grad_output)


@pytest.mark.slow
@given(drawn=calls(), grad_output=upstream)
@settings(max_examples=40, phases=[Phase.generate])  # shrinking would take the interpreter minutes
def test_the_kernels_equal_the_reference(device, drawn, grad_output):
    check("triton", device, drawn, grad_output)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("positions", [1, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sizes_around_a_block(device, backend, positions, dtype):
    pred, target, prior = (torch.randn(2, 16, 1, 1, positions).to(dtype) for _ in range(3))
    mask = torch.rand(2, 1, positions)
    check(backend, device, (pred, target, mask, MaskedLossConfig(), {"prior": prior}), 1.0)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("where", ["pred", "target", "mask", "prior"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate_as_in_the_reference(device, backend, where, value):
    tensors = {name: torch.randn(1, 2, 1, 4, 5) for name in ("pred", "target", "prior")}
    tensors["mask"] = torch.rand(1, 4, 5)
    tensors[where].view(-1)[3] = value
    config = MaskedLossConfig()
    want = reference(tensors["pred"], tensors["target"], tensors["mask"], config, prior=tensors["prior"])
    pred = tensors["pred"].to(device).requires_grad_()
    loss = masked_loss(
        pred,
        tensors["target"].to(device),
        tensors["mask"].to(device),
        config,
        prior=tensors["prior"].to(device),
        backend=backend,
    )
    loss.backward()
    assert loss.isnan() == want[0].isnan()
    assert loss.isinf() == want[0].isinf()
    assert torch.equal(pred.grad.isnan().cpu(), want[2].isnan())
    assert torch.equal(pred.grad.isinf().cpu(), want[2].isinf())


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_an_empty_mask_gives_zero_and_no_nan(device, backend):
    pred = torch.randn(2, 4, 2, 3, 5, device=device, requires_grad=True)
    loss = masked_loss(pred, torch.randn_like(pred).detach(), torch.zeros(2, 3, 5, device=device), backend=backend)
    loss.backward()
    assert loss == 0
    assert torch.equal(pred.grad, torch.zeros_like(pred))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_no_mask_is_a_mask_of_ones_bit_for_bit(device, backend):
    target = torch.randn(2, 4, 3, 5, 7, device=device)
    results = []
    for mask in (None, torch.ones(2, 3, 5, 7, device=device), torch.ones(1, 40, 56, device=device)):
        torch.manual_seed(1)
        pred = torch.randn(2, 4, 3, 5, 7).to(device).requires_grad_()
        loss = masked_loss(pred, target, mask, prior=target.flip(0), backend=backend)
        loss.backward()
        results.append((loss.detach(), pred.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_default_dtype_of_torch_changes_nothing(device, backend, default):
    """Some trainers set it to bfloat16."""
    tensors = [torch.randn(2, 4, 3, 5, 7, device=device) for _ in range(3)]
    mask = torch.rand(2, 3, 5, 7, device=device)

    def run():
        pred = tensors[0].clone().requires_grad_()
        config = MaskedLossConfig(blur_kernel_size=3, gamma=0.7)
        loss = masked_loss(pred, tensors[1], mask, config, prior=tensors[2], backend=backend)
        loss.backward()
        return loss.detach(), pred.grad

    want = run()
    torch.set_default_dtype(default)
    try:
        got = run()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", ["prior_weight", "weighting", "normalizer"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_numbers_of_any_dtype_leave_the_loss_in_float32(device, backend, per_sample, name, dtype):
    pred, target, prior = (torch.randn(2, 4, 1, 5, 7) for _ in range(3))
    number = torch.tensor(0.3, dtype=dtype)
    if name == "normalizer" and not per_sample:
        number = (number, number)
    elif name != "normalizer" and per_sample:
        number = torch.tensor([0.3, 0.7], dtype=dtype)
    config, call = MaskedLossConfig(per_sample=per_sample), {"prior": prior, name: number}
    check(backend, device, (pred, target, torch.rand(2, 1, 5, 7), config, call), 1.0)
    moved = {name: on(device, value) for name, value in call.items()}
    loss = masked_loss(on(device, pred), on(device, target), None, config, **moved, backend=backend)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_run_repeats_bit_for_bit(device, backend):
    pred, target, prior = (torch.randn(2, 16, 3, 13, 21, device=device) for _ in range(3))
    mask = torch.rand(2, 3, 13, 21, device=device)
    results = []
    for _ in range(3):
        leaf = pred.clone().requires_grad_()
        loss = masked_loss(leaf, target, mask, MaskedLossConfig(gamma=0.7), prior=prior, backend=backend)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("equal", [True, False], ids=["equal errors", "random errors"])
def test_the_loss_is_exact_at_ten_million_elements(equal):
    """1e-6 relative. Equal errors are the hard case: every rounding of a long running sum then goes the same way."""
    shape = (1, 16, 20, 180, 180)
    for value in (0.37, 1.2345, 2.9):
        pred = torch.full(shape, value) if equal else torch.randn(shape) * value
        mask = torch.full((1, 20, 180, 180), 0.7) if equal else torch.rand(1, 20, 180, 180)
        config = MaskedLossConfig()
        got = masked_loss(pred, torch.zeros(shape), mask, config, backend="torch")
        want = masked_loss(pred.double(), torch.zeros(shape, dtype=torch.float64), mask.double(), config)
        assert_loss_close(got, want, config)
