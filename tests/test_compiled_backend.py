"""backend="compiled": the numbers of the reference, from one function that torch.compile makes, compiled once for all sizes."""

import pytest
import torch

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss
from masked_loss_triton.backend import expression

# Inductor warns about what this machine lacks, and torch about its own deprecations.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def tensors(shape, dtype, memory="contiguous"):
    def make():
        values = torch.randn(shape).to(dtype)
        if memory == "channels last":
            return values.movedim(1, -1).contiguous().movedim(-1, 1)
        return torch.randn(*shape[:-1], shape[-1] + 2).to(dtype)[..., 1:-1] if memory == "cut out" else values

    return [make() for _ in range(3)]


def check(shape, dtype, memory="contiguous", flow=False, factor=1.0, **options):
    pred, target, prior = tensors(shape, dtype, memory)
    config = MaskedLossConfig(gamma=0.7, min_weight=0.05, **options)
    mask = torch.rand(shape[0], *shape[2:])
    results = []
    for backend, kind in (("compiled", dtype), ("reference", torch.float64)):
        leaf = pred.detach().to(kind).requires_grad_()
        other = FlowTarget(target.to(kind), prior.to(kind)) if flow else target.to(kind)
        loss = masked_loss(leaf, other, mask, config, prior=prior.to(kind), backend=backend)
        loss.backward(torch.tensor(factor, dtype=loss.dtype))
        results.append((loss.detach().double(), leaf.grad.double()))
    (got, got_gradient), (want, want_gradient) = results
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-9)
    precision = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(
        got_gradient, want_gradient, rtol=precision, atol=precision * want_gradient.abs().mean().item()
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
def test_it_gives_the_numbers_of_the_reference(dtype):
    check((2, 4, 3, 6, 10), dtype, loss_type="huber", factor=-3.0)


@pytest.mark.parametrize("memory", ["channels last", "cut out"])
def test_any_strides(memory):
    check((2, 4, 3, 6, 10), torch.float32, memory)


def test_a_flow_target():
    check((2, 4, 3, 6, 10), torch.float32, flow=True)


def test_another_size_compiles_nothing_new():
    torch._dynamo.reset()
    expression._compiled.cache_clear()
    check((2, 4, 3, 6, 10), torch.float32)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check((3, 8, 2, 9, 5), torch.float32)


def test_without_gradients_nothing_is_written():
    pred, target, _ = tensors((1, 4, 2, 6, 10), torch.float32)
    with torch.no_grad():
        loss = masked_loss(pred.requires_grad_(), target, None, backend="compiled")
    assert not loss.requires_grad
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(pred.detach(), target))


def test_a_machine_without_a_compiler_gets_one_clear_error(monkeypatch):
    def no_compiler(*_):
        raise torch._dynamo.exc.TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr(expression, "_compiled", lambda: no_compiler)
    pred, target, _ = tensors((1, 4, 2, 6, 10), torch.float32)
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler.*backend='torch'.*No working C\+\+ compiler"):
        masked_loss(pred, target, None, backend="compiled")


def test_other_devices_are_refused():
    pred = torch.empty(1, 4, 2, 6, 10, device="meta")
    with pytest.raises(ValueError, match=r"compiled.*CPU.*meta"):
        masked_loss(pred, pred, None, backend="compiled")
