"""The reference itself: against loops written from docs/formula.md, against closed facts, and by finite differences."""

import dataclasses
import json
import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from masked_loss_triton import FlowTarget, MaskedLoss, MaskedLossConfig, mask_weights, masked_loss
from masked_loss_triton.backend.formulas import ERROR_AND_SLOPE, error_and_slope
from masked_loss_triton.config import LOSS_TYPES


def area_average(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Adaptive average by explicit windows, any number of axes."""
    out = np.empty(size)
    for index in np.ndindex(*size):
        window = tuple(
            slice(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(index, values.shape, size, strict=True)
        )
        out[index] = values[window].mean()
    return out


def rho(d: float, kind: str, delta: float) -> float:
    size = abs(d)
    if kind == "mse":
        return d * d
    if kind == "l1":
        return size
    if kind == "huber":
        return 0.5 * d * d if size < delta else delta * (size - 0.5 * delta)
    if kind == "smooth_l1":
        return 0.5 * d * d / delta if size < delta else size - 0.5 * delta
    return delta**2 * (math.sqrt(1 + (d / delta) ** 2) - 1)


def by_hand(pred, target, prior, mask, config: MaskedLossConfig) -> float:
    """docs/formula.md, element by element; pred (B, C, F, H, W), mask (B, Fm, Hm, Wm)."""
    batch, channels, *grid = pred.shape
    terms = []
    for b in range(batch):
        m = area_average(np.clip(mask[b], 0, 1), tuple(grid))
        if config.binarize is not None:
            m = (m > max(config.binarize, 1e-6)).astype(float)
        raw = 1 - m if config.invert else m
        w = raw**config.gamma
        u = config.min_weight
        w = w * (1 - u) + u if config.floor == "affine" else np.maximum(w, u)
        v = 1 - w if config.prior_threshold is None else (raw < config.prior_threshold).astype(float)
        if config.prior_threshold is not None:
            w = w * (1 - v)
        sums = np.zeros(6)
        for c, *position in np.ndindex(channels, *grid):
            at = tuple(position)
            p = pred[(b, c, *at)]
            sums += (
                w[at] * rho(p - target[(b, c, *at)], config.loss_type, config.loss_delta),
                w[at],
                v[at] * rho(p - prior[(b, c, *at)], config.loss_type, config.loss_delta),
                v[at],
                1,
                raw[at],
            )
        terms.append(sums)
    terms = np.array(terms) if config.per_sample else np.array(terms).sum(0, keepdims=True)
    we, w, ve, v, count, raw = terms.T
    if config.normalization == "weighted_mean":
        target_term, prior_term = we / (w + config.eps), ve / (v + config.eps)
    elif config.normalization == "mean_one":
        target_term, prior_term = we / count / (w / count + config.eps), ve / count / (v / count + config.eps)
    else:
        target_term, prior_term = we / count, ve / count
    target_term = target_term * (raw / count) ** config.area_scale_beta
    return float((target_term + config.prior_weight * prior_term).mean())


# Every stage that `by_hand` spells out, switched on somewhere.
STAGES = [
    {},
    {"gamma": 0.6, "min_weight": 0.1},
    {"invert": True, "min_weight": 0.2, "floor": "clamp"},
    {"binarize": 0.5, "area_scale_beta": 0.7},
    {"prior_threshold": 0.45, "gamma": 2.0, "prior_weight": 0.3, "eps": 0.1},
]


def test_every_field_is_compared_with_the_table():
    here = {"loss_type", "loss_delta", "normalization", "per_sample"}.union(*STAGES)
    elsewhere = {"resample", "blur_kernel_size"}  # tests below, by torch's functions
    assert here | elsewhere == {field.name for field in dataclasses.fields(MaskedLossConfig)}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("normalization", ["weighted_mean", "mean_one", "mean"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("options", STAGES, ids=lambda options: "+".join(options) or "default")
def test_the_reference_is_the_contract(loss_type, normalization, per_sample, options):
    config = MaskedLossConfig(
        loss_type=loss_type, loss_delta=0.7, normalization=normalization, per_sample=per_sample, **options
    )
    pred, target, prior = (torch.randn(2, 3, 2, 4, 5, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 5, 9, 15, dtype=torch.float64)
    got = masked_loss(pred, target, mask, config, prior=prior)
    want = by_hand(pred.numpy(), target.numpy(), prior.numpy(), mask.numpy(), config)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("delta", [1.0, 0.3])
def test_every_kind_of_loss_has_a_formula_and_its_slope(loss_type, delta):
    assert set(ERROR_AND_SLOPE) == set(LOSS_TYPES)
    difference = torch.tensor([-3.0, -1.0, -0.3, -0.01, 0.0, 1e-6, 0.3, 0.7, 1.0, 4.0], dtype=torch.float64)
    error, slope = error_and_slope(difference.requires_grad_(), loss_type, delta)
    (wanted,) = torch.autograd.grad(error.sum(), difference, retain_graph=True)
    torch.testing.assert_close(slope, wanted)
    zero = torch.zeros_like(difference)
    torchs = {
        "mse": lambda d: d**2,
        "l1": lambda d: F.l1_loss(d, zero, reduction="none"),
        "huber": lambda d: F.huber_loss(d, zero, reduction="none", delta=delta),
        "smooth_l1": lambda d: F.smooth_l1_loss(d, zero, reduction="none", beta=delta),
        "pseudo_huber": lambda d: delta * ((d**2 + delta**2).sqrt() - delta),
    }
    torch.testing.assert_close(error, torchs[loss_type](difference))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_backend_computes_the_formula_of_the_table(device, backend, loss_type):
    """On either side of delta, far beyond it and near 0."""
    difference = torch.tensor([-3.0, -0.95, -0.45, -0.01, 0.0, 0.2, 0.45, 0.95, 40.0, 1e-4])
    error, slope = error_and_slope(difference.double(), loss_type, 0.7)
    pred = difference.view(1, 1, 1, 1, -1).to(device).requires_grad_()
    config = MaskedLossConfig(loss_type=loss_type, loss_delta=0.7)
    loss = masked_loss(pred, torch.zeros_like(pred), None, config, backend=backend)
    loss.backward()
    torch.testing.assert_close(loss.double().cpu(), error.mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(pred.grad.flatten().double().cpu() * 10, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("field", ["loss_type", "floor", "normalization", "resample"])
def test_a_word_without_a_formula_is_an_error_in_every_backend(device, backend, field):
    """As when somebody adds it to the config and forgets a backend: never what the last branch computes."""
    config = MaskedLossConfig(min_weight=0.1)
    object.__setattr__(config, field, "new")
    config.__dict__["_text"] = json.dumps(config.to_dict())
    pred, mask = torch.randn(1, 2, 1, 4, 4, device=device), torch.rand(1, 8, 8, device=device)
    with pytest.raises(Exception, match=r"(?s)new|unknown"):
        masked_loss(pred, torch.zeros_like(pred), mask, config, backend=backend)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_delta_for_each_sample_is_that_of_its_own_call(device, backend, loss_type):
    pred, target, prior = (torch.randn(2, 3, 1, 4, 4, device=device) for _ in range(3))
    config = MaskedLossConfig(loss_type=loss_type, per_sample=True)
    deltas = torch.tensor([0.3, 1.5], dtype=torch.float64, device=device)
    both = masked_loss(pred, target, None, config, prior=prior, loss_delta=deltas[:, None, None], backend=backend)
    alone = [
        masked_loss(
            pred[b : b + 1],
            target[b : b + 1],
            None,
            config.replace(loss_delta=float(delta)),
            prior=prior[b : b + 1],
            backend=backend,
        )
        for b, delta in enumerate(deltas)
    ]
    torch.testing.assert_close(both, sum(alone) / 2, rtol=1e-6, atol=0)


def test_mean_one_is_the_weighted_mean():
    pred, target = torch.randn(2, 16, 3, 8, 8, dtype=torch.float64), torch.randn(2, 16, 3, 8, 8, dtype=torch.float64)
    mask = torch.rand(2, 1, 64, 64)
    losses = [
        masked_loss(pred, target, mask, MaskedLossConfig(normalization=name)) for name in ("weighted_mean", "mean_one")
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-7, atol=0)


def test_the_weight_counts_once_per_channel():
    pred, target = torch.full((1, 16, 1, 4, 4), 2.0), torch.zeros(1, 16, 1, 4, 4)
    assert masked_loss(pred, target, torch.ones(1, 4, 4)).item() == pytest.approx(4.0)


def test_two_quadratic_terms_are_one():
    """a (p - t)^2 + b (p - q)^2 = (a + b)(p - t*)^2 + const, so the gradient is that of one weighted mse to t*."""
    pred = torch.randn(1, 4, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    target, prior = torch.randn_like(pred).detach(), torch.randn_like(pred).detach()
    mask = torch.rand(1, 5, 5, dtype=torch.float64)
    loss = masked_loss(pred, target, mask, MaskedLossConfig(prior_weight=0.8), prior=prior)
    (gradient,) = torch.autograd.grad(loss, pred)
    a = mask / (mask.sum() * 4)
    b = 0.8 * (1 - mask) / ((1 - mask).sum() * 4)
    collapsed = (a * target + b * prior) / (a + b)
    torch.testing.assert_close(gradient, 2 * (a + b) * (pred - collapsed).detach(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(("mask", "above"), [
    ([0.0, 1.0], [0, 0, 1, 1, 1, 1]),  # `bilinear` to six: the second is a whole pixel away from the white one, float32 says 1.5e-8
    ([0.0, 5e-7, 2e-6, 0.0, 1.0, 1e-30], [0, 0, 1, 0, 1, 0]),
])  # fmt: skip
def test_rounding_is_not_above_a_threshold_of_0(device, backend, mask, above):
    pred = torch.zeros(1, 1, 1, 1, 6, device=device, requires_grad=True)
    config = MaskedLossConfig(resample="bilinear", binarize=0.0, normalization="mean")
    mask = torch.tensor([[mask]], device=device)
    masked_loss(pred, torch.ones_like(pred).detach(), mask, config, backend=backend).backward()
    assert (pred.grad != 0).flatten().tolist() == [bool(one) for one in above]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_what_a_blur_leaves_below_the_snap_is_nothing(device, backend):
    """Of 3e-6 the blur leaves 1.6e-6, and 7e-7 beside it, of which the tenth root would make a quarter."""
    pred = torch.zeros(1, 1, 1, 1, 5, device=device, requires_grad=True)
    mask = torch.tensor([[[0, 0, 3e-6, 0, 0]]], device=device)
    config = MaskedLossConfig(blur_kernel_size=3, gamma=0.1, normalization="mean")
    masked_loss(pred, torch.ones_like(pred).detach(), mask, config, backend=backend).backward()
    assert (pred.grad != 0).flatten().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_rounding_has_no_area(device, backend):
    """What `bicubic` leaves of a white mask that is inverted is no area whose root could scale the target's term."""
    pred = torch.zeros(1, 1, 1, 7, 9, device=device, requires_grad=True)
    mask = torch.ones(1, 4, 5, device=device)
    config = MaskedLossConfig(resample="bicubic", invert=True, min_weight=0.1, area_scale_beta=0.5)
    loss, stats = masked_loss(pred, torch.ones_like(pred).detach(), mask, config, backend=backend, return_stats=True)
    assert loss == stats.raw_max == stats.error_inside == 0
    assert stats.error_outside == pytest.approx(1)


@pytest.mark.parametrize("size", [3, 5, 9, 31])
def test_the_blur_is_the_gaussian_of_the_table(size):
    """OpenCV's of that sigma: it would take fixed taps for small sizes."""
    sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8
    mask = torch.rand(1, 2, 12, 17, dtype=torch.float64)
    wanted = [
        cv2.GaussianBlur(frame, (size, size), sigma, borderType=cv2.BORDER_REPLICATE) for frame in mask[0].numpy()
    ]
    got, _ = mask_weights(mask, MaskedLossConfig(blur_kernel_size=size), shape=(1, 2, 12, 17))
    np.testing.assert_allclose(got[0].numpy(), np.stack(wanted), atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_white_mask_has_no_prior_region(device, backend):
    """Without the snap, float32 noise of 1 - w divided by its own sum is a loss of order 1."""
    mask = torch.full((1, 3, 33, 47), 255, dtype=torch.uint8, device=device)
    pred = torch.randn(1, 4, 3, 11, 13, device=device)
    config = MaskedLossConfig(blur_kernel_size=5, gamma=0.7, resample="bicubic")
    _, stats = masked_loss(
        pred, torch.zeros_like(pred), mask, config, prior=torch.ones_like(pred), backend=backend, return_stats=True
    )
    assert stats.prior_term == 0
    assert stats.prior_weight_max == 0


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(
    ("values", "options", "want"),
    [
        (
            [-1.0, 1.0, 0.25, 0.25, 0.0, 1.4, 1.0, 1.0],
            {},
            [0.5, 0.25, 0.5, 1.0],
        ),  # clamped on both sides, then averaged
        ([5e-7, 0.25, 0.5, 1.0], {"normalization": "mean"}, [0.0, 0.25, 0.5, 1.0]),  # the snap's lower edge,
        ([2e-6, 0.25, 0.5, 1.0], {"gamma": 0.25}, [0.0376060, 0.7071068, 0.8408964, 1.0]),  # and beyond it
        ([1 - 5e-7, 0.25, 0.5, 1.0], {"gamma": 64.0}, [1.0, 0.0, 0.0, 1.0]),  # its upper edge
    ],
)
def test_weights_at_the_edges(device, backend, values, options, want):
    """The gradient of an error of 1/2 in an mse is the weight over the denominator."""
    mask = torch.tensor([[values]], device=device)
    pred = torch.full((1, 1, 1, 1, 4), 0.5, device=device, requires_grad=True)
    masked_loss(pred, torch.zeros_like(pred), mask, MaskedLossConfig(**options), backend=backend).backward()
    weights = torch.tensor(want)
    count = 4 if "normalization" in options else weights.sum()
    torch.testing.assert_close(pred.grad.flatten().cpu() * count, weights, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_rounding_makes_no_region_for_the_prior(device, backend):
    """gamma lifts a weight that the first snap left below 1 to 1 - 5e-7: what remains is noise, and no region."""
    mask = torch.full((1, 2, 2), 1 - 2e-6, device=device)
    pred, prior = torch.zeros(1, 1, 2, 2, device=device), torch.ones(1, 1, 2, 2, device=device)
    config = MaskedLossConfig(gamma=0.25)
    _, stats = masked_loss(pred, pred, mask, config, prior=prior, backend=backend, return_stats=True)
    assert stats.prior_weight_max == stats.prior_term == 0


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize(
    ("normalization", "want"), [("mean_one", 0.5 / (0.5 + 0.25)), ("weighted_mean", 2 / (2 + 0.25))]
)
def test_eps_is_added_to_the_mean_or_to_the_sum(device, backend, normalization, want):
    """Four weights of 1/2 and errors of 1, eps = 1/4."""
    pred = torch.ones(1, 1, 2, 2, device=device)
    config = MaskedLossConfig(normalization=normalization, eps=0.25)
    mask = torch.full((1, 2, 2), 0.5, device=device)
    assert masked_loss(pred, torch.zeros_like(pred), mask, config, backend=backend).item() == pytest.approx(want)


def test_an_empty_sample_contributes_nothing_per_sample():
    pred, target = torch.randn(2, 3, 1, 4, 4), torch.randn(2, 3, 1, 4, 4)
    mask = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])
    loss = masked_loss(pred, target, mask, MaskedLossConfig(per_sample=True))
    assert loss.item() == pytest.approx(((pred[1] - target[1]) ** 2).mean().item() / 2, rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_sample_whose_mask_is_off_is_a_plain_mean(device, backend):
    pred, target, prior = (torch.randn(2, 3, 1, 4, 4, device=device) for _ in range(3))
    mask = torch.rand(2, 4, 4, device=device)
    config = MaskedLossConfig(per_sample=True, area_scale_beta=1.0, min_weight=0.1)
    off = torch.tensor([False, False], device=device)
    loss = masked_loss(pred, target, mask, config, prior=prior, mask_gate=off, backend=backend)
    assert loss.item() == pytest.approx(((pred - target) ** 2).mean().item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_a_closed_prior_gate_is_no_prior(device, backend):
    pred, target, prior = (torch.randn(2, 3, 1, 4, 4, device=device) for _ in range(3))
    mask = torch.rand(2, 4, 4, device=device)
    for config in (MaskedLossConfig(), MaskedLossConfig(prior_threshold=0.6)):
        closed = torch.zeros(2, device=device)
        gated = masked_loss(pred, target, mask, config, prior=prior, prior_gate=closed, backend=backend)
        without = masked_loss(pred, target, mask, config, backend=backend)
        assert torch.equal(gated, without)


def test_gradcheck_in_pred_target_prior_and_mask():
    config = MaskedLossConfig(gamma=0.8, min_weight=0.1, blur_kernel_size=3, prior_weight=0.7, per_sample=True)
    shapes = [(2, 2, 2, 3, 4)] * 3
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    mask = (torch.rand(2, 2, 6, 8, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda pred, target, prior, mask: masked_loss(pred, target, mask, config, prior=prior), (*tensors, mask)
    )


def test_the_flow_target_is_noise_minus_latents():
    pred, noise, latents = (torch.randn(1, 4, 2, 3, 3) for _ in range(3))
    mask = torch.rand(1, 3, 3)
    for sign in (1, -1):
        formed = masked_loss(pred, sign * (noise - latents), mask)
        torch.testing.assert_close(masked_loss(pred, FlowTarget(noise, latents, sign), mask), formed)


def test_the_module_is_the_function():
    pred, target, mask = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3), torch.rand(1, 3, 3)
    module = MaskedLoss(gamma=0.7, min_weight=0.05, backend="torch")
    assert "gamma=0.7" in repr(module)
    assert torch.equal(module(pred, target, mask), masked_loss(pred, target, mask, module.config))


def test_mask_weights_are_those_of_the_loss():
    mask = torch.rand(2, 1, 24, 40)
    config = MaskedLossConfig(gamma=0.7, min_weight=0.05, blur_kernel_size=3)
    w, v = mask_weights(mask, config, shape=(2, 3, 3, 5))
    assert w.shape == v.shape == (2, 3, 3, 5)
    assert w.dtype == v.dtype == torch.float32
    torch.testing.assert_close(v, 1 - w)
    pred, target = torch.randn(2, 4, 3, 3, 5), torch.randn(2, 4, 3, 3, 5)
    by_weights = ((pred - target) ** 2 * w.unsqueeze(1)).sum() / (w.sum() * 4)
    torch.testing.assert_close(masked_loss(pred, target, mask, config), by_weights)


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
@pytest.mark.parametrize("sizes", [(8, 3), (3, 8), (2, 41), (41, 2), (26, 123), (123, 26), (5, 5)])
def test_the_kernels_resample_as_interpolate_does(device, mode, sizes):
    """Also at the sizes where the rounded scale of `nearest` lands one input beside the exact quotient."""
    mask = torch.rand(1, 1, sizes[0], 6, device=device)
    pred = torch.zeros(1, 1, 1, sizes[1], 7, device=device)
    target = torch.ones_like(pred)
    leaf = pred.clone().requires_grad_()
    masked_loss(leaf, target, mask, MaskedLossConfig(resample=mode, normalization="mean"), backend="triton").backward()
    options = {"align_corners": False} if mode in ("bilinear", "bicubic") else {}
    resized = torch.nn.functional.interpolate(mask.double(), size=(sizes[1], 7), mode=mode, **options).clamp(0, 1)
    torch.testing.assert_close(
        leaf.grad[0, 0, 0].double(), -2 * resized[0, 0] / math.prod(resized.shape), rtol=4e-6, atol=2e-8
    )
