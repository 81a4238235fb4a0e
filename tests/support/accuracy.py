"""How close a fused backend must come to the float64 reference, and why no closer.

The reference runs on the same inputs in float64. A float32 gradient a rho'(p - t) + b rho'(p - q) is compared with the sum of the
magnitudes of its two terms (they may cancel), and each weight may be off by the rounding of a number of order 1 where its stages
subtract (1 - m, v = 1 - w, bicubic taps): a relative bound on the difference would be one on the noise.
"""

from __future__ import annotations

import torch

from masked_loss_triton import FlowTarget, MaskedLossConfig, masked_loss
from masked_loss_triton.backend.denominators import loss_factors
from masked_loss_triton.backend.formulas import error_and_slope
from masked_loss_triton.backend.stages import call_weights
from masked_loss_triton.call import describe

LOSS_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-6
GAMMA_TOLERANCE = 4e-6
# Rounding of one float32 number of order 1, times the longest chain of them in the stages of a weight.
WEIGHT_ROUNDING = 8e-7


def double(value):
    """The same argument in float64, without gradient. A flow target is formed in float32 first, as every backend does."""
    if isinstance(value, FlowTarget):
        return (value.sign * (value.noise.detach().float() - value.latents.detach().float())).double()
    if isinstance(value, torch.Tensor) and value.dtype.is_floating_point:
        return value.detach().double()
    return value


def reference(pred, target, mask, config: MaskedLossConfig, grad_output: float = 1.0, **call):
    """(loss, stats, gradient, bound): float64, and how far off each element of a float32 gradient may be."""
    call = {name: double(value) for name, value in call.items()}
    pred64 = double(pred).requires_grad_()
    arguments = (pred64, double(target), double(mask), config)
    loss, stats = masked_loss(*arguments, **call, backend="reference", return_stats=True)
    (gradient,) = torch.autograd.grad(loss * grad_output, pred64)

    call = {name: value for name, value in call.items() if name not in ("backend", "return_stats")}
    inputs = describe(*arguments, **call)
    raw, w, v = call_weights(inputs, config, torch.float64)
    sums = [x.sum(dim=(1, 2, 3)).expand(inputs.batch) for x in (w, v, raw)]
    s, r = loss_factors(*sums, inputs, config)
    taps = config.resample in ("bilinear", "bicubic")
    # Where a tap lies is a float32 number of up to the size of the mask.
    weight_rounding = WEIGHT_ROUNDING + (
        2**-24 * max(inputs.mask.shape[-2:]) if taps and inputs.mask is not None else 0
    )
    # A root is steep near 0: what a small mask value is off by counts for more in its weight.
    steepness = (config.gamma * raw.clamp(1e-6, 1) ** (config.gamma - 1)).clamp_min(1).unsqueeze(1)

    def magnitude(factor, weight, other):
        """(size of this term of the gradient, what the rounding of its weight may change it by), per element."""
        factor, weight = factor.abs().view(-1, 1, 1, 1, 1), weight.unsqueeze(1)
        slope = error_and_slope(inputs.pred.detach() - other, config.loss_type, inputs.delta(config, torch.float64))[
            1
        ].abs()
        exact = factor * weight * slope
        if not (config.invert or taps or weight_is_difference(other)):
            return exact, torch.zeros_like(exact)
        # A factor is one over a sum, times a power of another: where the weights of that sum are noise, so is the factor.
        noise = weight_rounding * ((weight > 0).sum() / weight.sum().clamp_min(1e-30))
        noise = noise + config.area_scale_beta * weight_rounding * ((raw > 0).sum() / raw.sum().clamp_min(1e-30))
        return exact, weight_rounding * steepness * factor * slope + exact * noise

    def weight_is_difference(other):
        return other is inputs.prior or config.prior_threshold is not None

    size, rounding = magnitude(s, w, inputs.target)
    if inputs.prior is not None:
        more, more_rounding = magnitude(r, v, inputs.prior)
        size, rounding = size + more, rounding + more_rounding
    tolerance = GRADIENT_TOLERANCE if config.gamma == 1 else GAMMA_TOLERANCE * max(1.0, config.gamma)
    bound = (tolerance * size + rounding) * abs(grad_output)
    if call.get("layout") == "layered":
        bound = bound.transpose(1, 2)
    if call.get("layout") == "packed":
        bound = bound.squeeze(2).transpose(1, 2)
    return loss.detach(), stats, gradient, bound.reshape(gradient.shape)


def assert_gradient_close(got, want, bound, truncates: bool = False) -> None:
    """`got` within `bound` of the float64 gradient `want`, after one rounding to got's dtype, plus one unit in the last place.

    truncates: the interpreter rounds float32 to bfloat16 by truncation, twice where the backward scales.
    """
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan()), "NaN in other places"
    usable = ~want.isnan() & ~want.isinf()
    slack = bound
    if got.dtype in (torch.bfloat16, torch.float16):
        info = torch.finfo(got.dtype)
        # One unit in the last place of the larger of the two, or of the smallest number that the dtype has.
        size = torch.maximum(want.abs(), got.double().abs()).clamp_min(info.tiny)
        unit = torch.exp2(torch.floor(torch.log2(size))) * info.eps
        slack = bound + unit * (3 if truncates and got.dtype == torch.bfloat16 else 1.5)
    error = (got.double() - want).abs()
    worst = ((error - slack) * usable).nan_to_num(0.0).max()
    assert worst <= 1e-38, f"gradient off by {error[usable].max():.3g}, {worst:.3g} more than allowed"


def assert_loss_close(got, want, config: MaskedLossConfig, weights_sum: float | None = None) -> None:
    tolerance = LOSS_TOLERANCE * (4 * max(1.0, config.gamma) if config.gamma != 1 else 1)
    assert got.dtype == torch.float32
    assert got.shape == ()
    if torch.isnan(want) or torch.isinf(want):
        assert torch.equal(got.isnan(), want.isnan())
    else:
        assert abs(got.double() - want) <= tolerance * abs(want) + 1e-30, f"loss {got.item()} against {want.item()}"
