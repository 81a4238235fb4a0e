"""Peak memory beside the inputs, counted and not sampled: every storage that comes to life while the loss runs."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss
from masked_loss_triton.backend import closed_form


class LiveStorages(TorchDispatchMode):
    """Sums the bytes of the storages that operators made inside and that are still alive."""

    def __init__(self, known):
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.live = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.known and storage.nbytes():
                    self.live[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        self.live = {key: (ref, size) for key, (ref, size) in self.live.items() if ref() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def extra_memory(pred, target, mask, config, backend, **call) -> float:
    """Peak bytes of forward and backward, in bytes of pred; the gradient itself is one of them."""
    leaf = pred.clone().requires_grad_()
    torch.use_deterministic_algorithms(False)  # filling empty tensors is not ours
    pair = [target] if isinstance(target, torch.Tensor) else [target.noise, target.latents]
    with LiveStorages([leaf, mask, *pair, *call.values()]) as counted:
        masked_loss(leaf, target, mask, config, backend=backend, **call).backward()
    return counted.peak / (pred.numel() * pred.element_size())


def test_the_torch_backend_needs_the_gradient_and_little_else():
    """The gradient, weights of 1/16 per term and a buffer or two for each thread; the peers' recipes need 2 to 3 N."""
    shape = (1, 16, 33, 90, 160)
    pred, target = torch.randn(shape), torch.randn(shape)
    mask = torch.rand(1, 33, 90, 160)
    buffer = closed_form.CPU_BLOCK * torch.get_num_threads() / pred.numel()
    assert extra_memory(pred, target, mask, MaskedLossConfig(), "torch") <= 1.08 + 1.1 * buffer
    assert extra_memory(pred, target, mask, MaskedLossConfig(), "torch", prior=target.flip(0)) <= 1.14 + 2.7 * buffer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_kernels_need_the_gradient_and_a_few_sums(device, dtype):
    pred, target = (torch.randn(1, 16, 3, 20, 26, device=device).to(dtype) for _ in range(2))
    mask = torch.rand(1, 3, 20, 26, device=device)
    assert extra_memory(pred, target, mask, MaskedLossConfig(gamma=0.7), "triton", prior=target.flip(2)) <= 1.1


def test_the_flow_target_is_never_written(device):
    pred, noise, latents = (torch.randn(1, 16, 3, 20, 26, device=device) for _ in range(3))
    mask = torch.rand(1, 3, 20, 26, device=device)
    assert extra_memory(pred, FlowTarget(noise, latents), mask, MaskedLossConfig(), "triton") <= 1.1


def test_without_gradients_nothing_of_the_size_of_pred_is_made(device):
    pred, target = (torch.randn(1, 16, 9, 40, 64) for _ in range(2))
    mask = torch.rand(1, 9, 40, 64)
    torch.use_deterministic_algorithms(False)
    for backend, limit in (("torch", 3.4), ("triton", 0.1)):
        moved = [x.to(device) for x in (pred, target, mask)]
        with LiveStorages(moved) as counted, torch.no_grad():
            masked_loss(*moved, backend=backend)
        # The torch backend's blocks are as large as this whole input; at 33 x 90 x 160 they are 0.1 of it.
        assert counted.peak <= limit * pred.numel() * 4
