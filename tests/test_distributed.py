"""N ranks, or N micro-batches, give the weighted mean of the one big batch: real processes over gloo."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from masked_loss_triton import MaskedLossConfig, mask_weights, masked_loss

CONFIGS = {
    "weighted_mean": MaskedLossConfig(gamma=0.7, min_weight=0.05),
    "mean_one": MaskedLossConfig(normalization="mean_one"),
    "mean": MaskedLossConfig(normalization="mean"),
    "per_sample": MaskedLossConfig(per_sample=True),
    "area": MaskedLossConfig(area_scale_beta=0.5),
    "threshold": MaskedLossConfig(prior_threshold=0.4),
}


def batch():
    generator = torch.Generator().manual_seed(11)
    pred, target, prior = (torch.randn(4, 3, 2, 5, 6, generator=generator) for _ in range(3))
    mask = torch.rand(4, 2, 5, 6, generator=generator) * torch.tensor([1.0, 0.1, 0.5, 0.0]).view(4, 1, 1, 1)
    return pred, target, prior, mask


def whole(config, with_prior, backend):
    pred, target, prior, mask = batch()
    leaf = pred.requires_grad_()
    loss = masked_loss(leaf, target, mask, config, prior=prior if with_prior else None, backend=backend)
    loss.backward()
    return loss.detach(), leaf.grad


def rank_main(rank: int, size: int, store: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    pred, target, prior, mask = (x.chunk(size)[rank] for x in batch())
    for name, config in CONFIGS.items():
        for with_prior in (False, True):
            for backend in ("reference", "torch", "triton"):
                leaf = pred.clone().requires_grad_()
                loss = masked_loss(
                    leaf,
                    target,
                    mask,
                    config,
                    prior=prior if with_prior else None,
                    process_group=dist.group.WORLD,
                    backend=backend,
                )
                loss.backward()
                results.put((name, with_prior, backend, rank, loss.detach().numpy(), leaf.grad.numpy()))
    # The one who reads the queue says when everything arrived.
    dist.barrier()
    dist.destroy_process_group()


def test_a_gradient_that_the_exchange_would_lose_is_refused(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        pred, target, _, mask = batch()
        with pytest.raises(ValueError, match=r"mask, prior_gate or normalizer requires grad.*process_group"):
            masked_loss(pred, target, mask.requires_grad_(), process_group=dist.group.WORLD, backend="reference")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("group", ["world", 0, object()])
def test_what_is_no_process_group_is_refused(group):
    pred, target, _, mask = batch()
    with pytest.raises(
        TypeError, match=r"process_group must be a torch.distributed.ProcessGroup.*got (str|int|object)"
    ):
        masked_loss(pred, target, mask, process_group=group)


def test_two_ranks_are_one_batch(tmp_path):
    """The mean over the ranks, which data parallel training takes, is the loss and the gradient of the whole batch."""
    context = mp.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=rank_main, args=(rank, 2, tmp_path / "store", results)) for rank in range(2)]
    for process in processes:
        process.start()
    received = [results.get(timeout=120) for _ in range(2 * len(CONFIGS) * 2 * 3)]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    by_case = {}
    for name, with_prior, backend, rank, loss, gradient in received:
        by_case.setdefault((name, with_prior, backend), {})[rank] = torch.tensor(loss), torch.from_numpy(gradient)
    assert len(by_case) == len(CONFIGS) * 6
    for (name, with_prior, backend), ranks in by_case.items():
        loss, gradient = whole(CONFIGS[name], with_prior, backend)
        torch.testing.assert_close((ranks[0][0] + ranks[1][0]) / 2, loss, rtol=2e-6, atol=1e-8)
        averaged = torch.cat([ranks[0][1], ranks[1][1]]) / 2
        torch.testing.assert_close(averaged, gradient, rtol=4e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("name", ["weighted_mean", "mean_one", "mean", "per_sample", "threshold"])
def test_two_micro_batches_are_one_batch(name, with_prior, backend):
    """Unequal micro-batches: the losses add up when each gets the denominator of the window."""
    config = CONFIGS[name]
    loss, gradient = whole(config, with_prior, backend)
    pred, target, prior, mask = batch()
    w, v = mask_weights(mask, config, shape=(4, 2, 5, 6))
    if not with_prior:
        w, _ = mask_weights(mask, config, shape=(4, 2, 5, 6), has_prior=False)
    if config.per_sample:
        normalizer = 4
    elif config.normalization == "mean":
        normalizer = pred.numel()
    else:
        normalizer = (w.sum() * 3, v.sum() * 3) if with_prior else w.sum() * 3
    leaf = pred.requires_grad_()
    total = 0
    for part in (slice(0, 1), slice(1, 4)):
        micro = masked_loss(
            leaf[part],
            target[part],
            mask[part],
            config,
            prior=prior[part] if with_prior else None,
            normalizer=normalizer,
            backend=backend,
        )
        micro.backward()
        total += micro.detach()
    torch.testing.assert_close(total, loss, rtol=2e-6, atol=1e-8)
    torch.testing.assert_close(leaf.grad, gradient, rtol=4e-6, atol=1e-9)
