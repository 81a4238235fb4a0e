"""torch.compile without graph breaks, fake tensors, export, and the rules of operators."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss

BACKENDS = ["reference", "torch", "triton"]
# Inductor warns about what this machine lacks, and torch about its own deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


def inputs(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    pred, target, prior = (torch.randn(2, 4, 3, 6, 10, generator=generator).to(device, dtype) for _ in range(3))
    return pred, target, prior, torch.rand(2, 1, 48, 80, generator=generator).to(device)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_compiled_without_a_graph_break_it_is_the_same(device, backend, dtype):
    pred, target, prior, mask = inputs(device, dtype)
    config = MaskedLossConfig(gamma=0.7, prior_threshold=0.5, loss_type="huber")

    def step(pred):
        loss, stats = masked_loss(
            pred, FlowTarget(target, target.flip(0)), mask, config, prior=prior, backend=backend, return_stats=True
        )
        return loss * 2, stats.raw_mean

    torch._dynamo.reset()
    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        leaf = pred.clone().requires_grad_()
        loss, mean = function(leaf)
        loss.backward()
        results.append((loss.detach(), mean, leaf.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_compiled_loss_can_be_differentiated_twice_over(device, backend):
    pred, target, _, mask = inputs(device)
    torch._dynamo.reset()
    compiled = torch.compile(lambda pred: masked_loss(pred, target, mask, backend=backend), fullgraph=True)
    leaf = pred.clone().requires_grad_()
    loss = compiled(leaf)
    first, second = (torch.autograd.grad(loss * factor, leaf, retain_graph=True)[0] for factor in (3.0, 1.0))
    torch.testing.assert_close(first, second * 3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_tensor_may_be_target_and_prior(device, backend):
    pred, target, _, mask = inputs(device)
    torch._dynamo.reset()
    results = []
    for function in (masked_loss, torch.compile(masked_loss, fullgraph=True)):
        leaf = pred.clone().requires_grad_()
        loss = function(leaf, target, mask, prior=target, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_prior_weight_that_changes_at_every_step(device, backend):
    pred, target, prior, mask = inputs(device)
    torch._dynamo.reset()
    compiled = torch.compile(masked_loss, fullgraph=True)
    for weight in (0.1, 0.2, 0.35):
        want = masked_loss(pred, target, mask, prior=prior, prior_weight=weight, backend=backend)
        got = compiled(pred, target, mask, prior=prior, prior_weight=weight, backend=backend)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_fake_tensors_give_shapes_dtypes_and_never_wait(backend, dtype):
    """A fake tensor has no values: whoever reads one, and would synchronise on a GPU, raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        pred = torch.empty(2, 4, 3, 6, 10, dtype=dtype, requires_grad=True)
        target, prior = (torch.empty(2, 4, 3, 6, 10) for _ in range(2))
        mask, gate = torch.empty(2, 1, 48, 80), torch.empty(2, dtype=torch.bool)
        loss, stats = masked_loss(
            pred,
            target,
            mask,
            MaskedLossConfig(blur_kernel_size=3),
            prior=prior,
            mask_gate=gate,
            backend=backend,
            return_stats=True,
        )
        loss.backward()
        assert loss.shape == stats.loss.shape == ()
        assert loss.dtype == torch.float32
        assert pred.grad.shape == pred.shape
        assert pred.grad.dtype == dtype


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_tensors_without_storage_give_shapes(backend):
    pred = torch.empty(2, 4, 3, 6, 10, device="meta", requires_grad=True)
    loss = masked_loss(pred, torch.empty_like(pred).detach(), torch.empty(2, 48, 80, device="meta"), backend=backend)
    loss.backward()
    assert loss.shape == ()
    assert pred.grad.shape == pred.shape


def test_operators_keep_their_promises(device):
    """Schema, fake implementation and aliasing, as torch checks them."""
    from masked_loss_triton.backend import fused

    pred, target, prior, mask = inputs(device)
    none = [None] * 6
    text = MaskedLossConfig().to_text()
    tests = ("test_schema", "test_faketensor")
    operators = fused.OPERATORS
    tensors = (pred, target, None, prior, mask, *none)
    for write in (True, False):
        torch.library.opcheck(operators.forward, (*tensors, 1, 0.5, [], text, True, write), test_utils=tests)
    go = torch.tensor(2.0, device=device)
    torch.library.opcheck(operators.gradient, (*tensors, 1, 0.5, [], text, go), test_utils=tests)
    torch.library.opcheck(operators.sums, (*tensors, 1, 0.5, [], text), test_utils=tests)


def test_it_can_be_exported(device):
    pred, target, prior, mask = inputs(device)

    class Loss(torch.nn.Module):
        def forward(self, pred, target, mask, prior):
            return masked_loss(pred, target, mask, prior=prior, backend="triton")

    program = torch.export.export(Loss(), (pred, target, mask, prior))
    torch.testing.assert_close(program.module()(pred, target, mask, prior), Loss()(pred, target, mask, prior))


@pytest.mark.gpu
def test_it_can_be_captured_in_a_cuda_graph():
    pred, target, prior, mask = inputs("cuda")
    leaf = pred.requires_grad_()
    masked_loss(leaf, target, mask, prior=prior).backward()
    want = leaf.grad.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (gradient,) = torch.autograd.grad(masked_loss(leaf, target, mask, prior=prior), leaf)
    graph.replay()
    torch.testing.assert_close(gradient, want)
