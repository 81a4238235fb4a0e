"""Offsets past 2^31 elements: views of a sparse file, whose pages exist only where they are touched."""

import pytest
import torch

from masked_loss_triton import masked_loss

APART = 2**30 + 64  # elements between frames: the third lies past 2^31


def far_apart(path, values, dtype):
    """(1, ..., 3, H, W) with its three frames APART elements from each other, at the end of which stands the last."""
    *_, frames, height, width = values.shape
    channels = values.shape[1] if values.dim() == 5 else 1
    size = (frames - 1) * APART + channels * height * width
    storage = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    strides = (0, height * width, APART, width, 1) if values.dim() == 5 else (0, APART, width, 1)
    view = storage.as_strided(values.shape, strides)
    view.copy_(values)
    return view


@pytest.mark.parametrize("wide", ["mask", "target"])
def test_frames_past_two_to_the_31(tmp_path, device, wide):
    if device != "cpu":
        pytest.skip("the sparse file lies on the CPU")
    pred, target = torch.randn(1, 2, 3, 4, 6), torch.randn(1, 2, 3, 4, 6).bfloat16()
    mask = (torch.rand(1, 3, 4, 6) * 255).to(torch.uint8)
    given = {"mask": mask, "target": target}
    given[wide] = far_apart(tmp_path / "file", given[wide], given[wide].dtype)
    results = []
    for tensors in (given, {"mask": mask, "target": target}):
        leaf = pred.clone().requires_grad_()
        loss = masked_loss(leaf, tensors["target"], tensors["mask"], backend="triton")
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(results[0], results[1])
