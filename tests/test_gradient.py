"""What training does with a loss: scales it, backpropagates twice, accumulates, runs it under autocast."""

import pytest
import torch

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss

BACKENDS = ["reference", "torch", "triton"]


def case(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    pred, target, prior = (torch.randn(2, 4, 3, 5, 7, generator=generator).to(device, dtype) for _ in range(3))
    mask = torch.rand(2, 3, 5, 7, generator=generator).to(device)
    return pred, target, prior, mask


def gradient(pred, target, prior, mask, backend, factor=1.0):
    leaf = pred.clone().requires_grad_()
    (masked_loss(leaf, target, mask, prior=prior, backend=backend) * factor).backward()
    return leaf.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, 0.0, -3.0, 1 / 7])
def test_a_gradient_from_above_scales_it(device, backend, factor):
    pred, target, prior, mask = case(device)
    want = gradient(pred, target, prior, mask, "reference") * factor
    torch.testing.assert_close(gradient(pred, target, prior, mask, backend, factor), want, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factors", [(1.0, 1.0), (2.0, 3.0), (0.0, 1.0)])
def test_backward_twice_with_retain_graph(device, backend, factors):
    pred, target, prior, mask = case(device)
    once = gradient(pred, target, prior, mask, backend)
    leaf = pred.clone().requires_grad_()
    loss = masked_loss(leaf, target, mask, prior=prior, backend=backend)
    gradients = [
        torch.autograd.grad(loss, leaf, torch.full_like(loss, factor), retain_graph=True)[0] for factor in factors
    ]
    for factor, got in zip(factors, gradients, strict=True):
        torch.testing.assert_close(got, once * factor, rtol=2e-6, atol=1e-9)
    leaf.grad = None
    for factor in factors:
        (loss * factor).backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, once * sum(factors), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_in_the_users_hands_is_never_written_again(device, backend):
    pred, target, _, mask = case(device)
    leaf = pred.clone().requires_grad_()
    loss = masked_loss(leaf, target, mask, backend=backend)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    torch.autograd.grad(loss * 5, leaf, retain_graph=True)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_accumulate_over_calls(device, backend):
    pred, target, prior, mask = case(device)
    once = gradient(pred, target, prior, mask, backend)
    leaf = pred.clone().requires_grad_()
    for _ in range(3):
        masked_loss(leaf, target, mask, prior=prior, backend=backend).backward()
    torch.testing.assert_close(leaf.grad, 3 * once, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_flows_through_what_made_pred(device, backend):
    pred, target, _, mask = case(device)
    weight = torch.ones(4, device=device, requires_grad=True)
    masked_loss(pred * weight.view(1, 4, 1, 1, 1), target, mask, backend=backend).backward()
    other = torch.ones(4, device=device, requires_grad=True)
    w = mask.unsqueeze(1)
    ((pred * other.view(1, 4, 1, 1, 1) - target) ** 2 * w).sum().div(w.sum() * 4).backward()
    torch.testing.assert_close(weight.grad, other.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_input_is_modified(device, backend):
    pred, target, prior, mask = case(device)
    before = [x.clone() for x in (pred, target, prior, mask)]
    leaf = pred.requires_grad_()
    loss = masked_loss(
        leaf, target, mask, MaskedLossConfig(blur_kernel_size=3, gamma=2.0), prior=prior, backend=backend
    )
    (loss * 3).backward()
    for x, y in zip((pred, target, prior, mask), before, strict=True):
        assert torch.equal(x.detach(), y)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_float16_survives_a_loss_scale(device, backend):
    """Gradients of 1e-8 are zero in float16: they must be multiplied by the loss scale before they are rounded."""
    generator = torch.Generator().manual_seed(0)
    pred = (torch.randn(1, 4, 1, 40, 50, generator=generator) * 0.01).to(device, torch.float16)
    target = torch.zeros_like(pred)
    mask = torch.rand(1, 40, 50, generator=generator).to(device)
    scale = 2.0**16
    exact = pred.double().requires_grad_()
    (masked_loss(exact, target.double(), mask) * scale).backward()
    for _ in range(2):  # the second time the scale is foreseen
        leaf = pred.clone().requires_grad_()
        (masked_loss(leaf, target, mask, backend=backend) * scale).backward()
        assert leaf.grad.count_nonzero() == pred.count_nonzero()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=2**-11, atol=2**-24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_gives_the_same_loss_and_no_graph(device, backend):
    pred, target, prior, mask = case(device)
    leaf = pred.clone().requires_grad_()
    with torch.no_grad():
        loss = masked_loss(leaf, target, mask, prior=prior, backend=backend)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, masked_loss(leaf, target, mask, prior=prior, backend=backend).detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(device, backend):
    pred, target, prior, mask = case(device, torch.bfloat16)
    plain = gradient(pred, target, prior, mask, backend)
    with torch.autocast(device, torch.bfloat16):
        under = gradient(pred, target, prior, mask, backend)
    assert torch.equal(plain, under)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["target", "prior", "mask", "weighting", "latents", "noise"])
def test_a_gradient_that_would_be_lost_is_refused(device, backend, name):
    pred, target, prior, mask = case(device)
    tensors = {"target": target, "prior": prior, "mask": mask, "weighting": torch.ones(2, device=device)}
    if name in ("latents", "noise"):
        pair = {"noise": target.clone(), "latents": prior.clone()}
        pair[name].requires_grad_()
        tensors["target"] = FlowTarget(**pair)
    else:
        tensors[name] = tensors[name].clone().requires_grad_()
    mask = tensors.pop("mask")
    wanted = "target" if name == "noise" else name
    with pytest.raises(ValueError, match=rf"{wanted} requires grad.*detach {wanted}.*reference"):
        masked_loss(pred.requires_grad_(), tensors.pop("target"), mask, **tensors, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_differentiating_twice_is_refused(device, backend):
    pred, target, _, mask = case(device)
    leaf = pred.clone().requires_grad_()
    loss = masked_loss(leaf * leaf, target, mask, backend=backend)
    with pytest.raises(RuntimeError, match=r"differentiable once.*reference"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # torch's own, where it makes dual numbers
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_tangent_that_would_be_lost_is_refused(device, backend):
    pred, target, _, mask = case(device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(pred, torch.ones_like(pred))
        with pytest.raises(RuntimeError, match=r"pred carries a tangent.*reference"):
            masked_loss(dual, target, mask, backend=backend)
        loss = masked_loss(dual, target, mask, backend="reference")
        tangent = torch.autograd.forward_ad.unpack_dual(loss).tangent
    torch.testing.assert_close(tangent, gradient(pred, target, None, mask, "reference").sum())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_transforms_of_torch_func_are_refused_in_one_line(device, backend):
    pred, target, _, mask = case(device)

    def loss(pred):
        return masked_loss(pred, target, mask, backend=backend)

    for transformed, argument in ((torch.func.grad(loss), pred), (torch.vmap(loss), torch.stack([pred, pred]))):
        with pytest.raises(RuntimeError, match=r"torch.func and torch.vmap.*reference"):
            transformed(argument)
