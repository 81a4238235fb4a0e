"""What only a device can show: programs that race, streams, other devices, graphs, storage off its alignment, calls made again."""

import pytest
import torch

pytest.importorskip("triton")

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.backend import replay
from masked_loss_triton.kernels import devices

pytestmark = pytest.mark.gpu
WAN_480P = (1, 16, 21, 60, 104)
HV_720P = (8, 16, 33, 90, 160)


@pytest.fixture(autouse=True)
def unpoisoned():
    """Filling what `torch.empty` gives would put kernels between ours, and hide a race."""
    torch.use_deterministic_algorithms(False)


def tensors(shape, device="cuda", dtype=torch.float32):
    pred, target = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    return pred.requires_grad_(), target, torch.rand(shape[0], *shape[2:], device=device)


def both(pred, target, mask, **call):
    loss = masked_loss(pred, target, mask, **call)
    return loss.detach(), torch.autograd.grad(loss, pred)[0]


def assert_same(got, want):
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
def test_the_last_block_finds_every_term_on_two_streams_at_once():
    """A thousand times: a program that read a term before it was written would change a bit now and then."""
    calls = [tensors(WAN_480P), tensors(WAN_480P)]
    wanted = [both(*call, prior=call[1].flip(0)) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(1000):
        results = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(both(*call, prior=call[1].flip(0)))
        torch.cuda.synchronize()
        for got, want in zip(results, wanted, strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_call_that_is_made_again_gives_the_bits_of_the_whole_way(dtype):
    replay._recording.cache_clear()
    both(*tensors(WAN_480P, dtype=dtype))
    call = tensors(WAN_480P, dtype=dtype)
    again = both(*call)
    replay._recording.cache_clear()
    assert_same(again, both(*call))


def test_a_second_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for _ in range(3):
        pred, target, mask = tensors(WAN_480P, device="cuda:1")
        got = both(pred, target, mask)
        with torch.cuda.device(1):
            assert_same(got, both(pred, target, mask))
        torch.testing.assert_close(got[0], masked_loss(pred, target, mask, backend="torch").detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storage_off_its_alignment(offset, dtype):
    def moved(x):
        storage = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)
        return storage[offset:].view(x.shape).copy_(x)

    for _ in range(2):
        pred, target, mask = tensors((2, 16, 3, 20, 26), dtype=dtype)
        want = both(pred, target, mask)
        got = both(moved(pred.detach()).requires_grad_(), moved(target), moved(mask))
        assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=0)


def test_a_large_batch_against_float64():
    pred, target, mask = tensors(HV_720P, dtype=torch.bfloat16)
    loss, gradient = both(pred, target, mask)
    weight = mask.double().unsqueeze(1)
    error = pred.detach().double() - target.double()
    total = weight.sum() * HV_720P[1] + 1e-8
    torch.testing.assert_close(loss.double(), (weight * error**2).sum() / total, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, (2 * weight * error / total).to(gradient.dtype), rtol=2**-7, atol=0)


@pytest.mark.parametrize("config", [MaskedLossConfig(), MaskedLossConfig(gamma=0.7, blur_kernel_size=5)])
def test_a_graph_replayed_with_changed_inputs(config):
    pred, target, mask = tensors(WAN_480P)
    for _ in range(3):
        both(pred, target, mask, config=config)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both(pred, target, mask, config=config)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(pred, target, mask, config=config)
    for _ in range(300):
        with torch.no_grad():
            for x in (pred, target):
                x.normal_()
            mask.uniform_()
        graph.replay()
        got = [x.clone() for x in captured]
        assert_same(got, both(pred, target, mask, config=config))


@pytest.mark.slow
def test_a_loss_that_begins_before_the_weights_have_ended_gives_the_same_bits(monkeypatch):
    """A thousand times, small and large: one that did not wait would read the sums of the call before."""
    here = devices.hardware(torch.device("cuda", torch.cuda.current_device()))
    if not here.overlaps:
        pytest.skip("this device starts one kernel after the other")
    calls = [tensors((1, 16, 1, 26, 38)), tensors(WAN_480P), tensors(HV_720P)]
    with monkeypatch.context() as patch:
        patch.setattr(devices, "hardware", lambda device: here._replace(overlaps=False))
        replay._recording.cache_clear()
        wanted = [both(*call) for call in calls]
    replay._recording.cache_clear()
    for _ in range(1000):
        for call, want in zip(calls, wanted, strict=True):
            assert_same(both(*call), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_loss_scale_that_changes_between_replays_of_a_graph(dtype):
    """What the last replay was given is read and written on the device alone."""
    pred, target, mask = tensors(WAN_480P, dtype=dtype)
    scale = torch.ones((), device="cuda")

    def step():
        return torch.autograd.grad(masked_loss(pred, target, mask), pred, scale)[0]

    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for number in (1.0, 0.25, 0.25, 2.0**16, 2.0**16, 2.0**15, 0.3):
        scale.fill_(number)
        graph.replay()
        got = captured.clone()
        assert torch.equal(got, step())


def test_no_call_waits_for_the_device():
    call = tensors(WAN_480P)
    both(*call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(*call)
        both(*call, return_stats=False, prior=call[1])
    finally:
        torch.cuda.set_sync_debug_mode("default")
