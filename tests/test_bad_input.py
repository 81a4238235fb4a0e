"""Every wrong shape, dtype, device, range or combination gets one error that names it and says what is taken."""

import pytest
import torch

from masked_loss_triton import FlowTarget, MaskedLoss, MaskedLossConfig, mask_weights, masked_loss

PRED = torch.zeros(2, 4, 3, 5, 7)
MASK = torch.ones(2, 5, 7)
PRIOR = torch.zeros_like(PRED)
PER_SAMPLE = MaskedLossConfig(per_sample=True)


def rejects(error, match, pred=PRED, target=None, mask=MASK, config=None, **call):
    with pytest.raises(error, match=match):
        masked_loss(pred, torch.zeros_like(pred) if target is None else target, mask, config, **call)


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (TypeError, r"pred must be a torch.Tensor, got list", dict(pred=[1.0], target=PRED)),
        (ValueError, r"pred must be \(B, C, F, H, W\) or \(B, C, H, W\).*got \(4, 5\)", dict(pred=torch.zeros(4, 5))),
        (ValueError, r"pred must be \(B, L, C, H, W\)", dict(pred=torch.zeros(1, 4, 5, 5), layout="layered")),
        (ValueError, r"pred has no elements: its shape is \(0, 4, 3, 5, 7\)", dict(pred=PRED[:0])),
        (TypeError, r"pred must be one of float32.*got int64", dict(pred=PRED.long())),
        (TypeError, r"target must be a torch.Tensor, got float", dict(target=0.0)),
        (
            ValueError,
            r"target must have the shape of pred, \(2, 4, 3, 5, 7\), got \(2, 4, 3, 5\)",
            dict(target=PRED[..., 0]),
        ),
        (TypeError, r"target must be one of float32.*got complex64", dict(target=PRED.to(torch.complex64))),
        (ValueError, r"target is on meta and pred on cpu: move target to cpu", dict(target=PRED.to("meta"))),
        (ValueError, r"target.latents must have the shape of pred", dict(target=FlowTarget(PRED, PRED[:1]))),
        (ValueError, r"target.noise is on meta", dict(target=FlowTarget(PRED.to("meta"), PRED))),
        (ValueError, r"prior must have the shape of pred.*got \(1, 4, 3, 5, 7\)", dict(prior=PRED[:1])),
        (ValueError, r"mask must be .*\(B, Hm, Wm\), where B may be 1, got \(5, 7\)", dict(mask=MASK[0])),
        (ValueError, r"mask must be .*got \(2, 3, 1, 5, 7\)", dict(mask=torch.ones(2, 3, 1, 5, 7))),
        (ValueError, r"mask must have batch size 2 as pred, or 1, got 3", dict(mask=torch.ones(3, 5, 7))),
        (ValueError, r"mask has no elements: its shape is \(2, 0, 7\)", dict(mask=torch.ones(2, 0, 7))),
        (TypeError, r"mask must be one of .*uint8, bool, got int64: use float in \[0, 1\]", dict(mask=MASK.long())),
        (TypeError, r"mask must be a torch.Tensor, got str", dict(mask="mask.png")),
        (ValueError, r"mask is on meta and pred on cpu", dict(mask=MASK.to("meta"))),
        (ValueError, r"3 frames or channels.*image batch", dict(pred=PRED[:, :, 0], mask=torch.ones(2, 3, 5, 7))),
        (
            ValueError,
            r"mask has 3 layers.*pred has 2",
            dict(pred=PRED[:, :2], mask=torch.ones(2, 3, 5, 7), layout="layered"),
        ),
        (ValueError, r"layout must be one of 'channels_first', 'layered', 'packed', got 'nhwc'", dict(layout="nhwc")),
        (ValueError, r"weighting must hold one number per sample, \(2,\).*got \(3,\)", dict(weighting=torch.ones(3))),
        (ValueError, r"weighting must hold one number per sample.*got \(2, 4\)", dict(weighting=torch.ones(2, 4))),
        (TypeError, r"weighting must be a torch.Tensor, got float", dict(weighting=2.0)),
        (ValueError, r"loss_delta must hold one number per sample", dict(loss_delta=torch.ones(3))),
        (TypeError, r"loss_delta must be a torch.Tensor, got float", dict(loss_delta=0.5)),
        (TypeError, r"mask_gate must be one of bool, got float32", dict(mask_gate=torch.ones(2))),
        (ValueError, r"mask_gate must hold one number per sample", dict(mask_gate=torch.ones(3, dtype=torch.bool))),
        (ValueError, r"prior_gate was given without prior", dict(prior_gate=torch.ones(2))),
        (ValueError, r"prior_weight was given without prior", dict(prior_weight=0.5)),
        (
            ValueError,
            r"prior_weight with one value per sample needs a config with per_sample=True",
            dict(prior=PRIOR, prior_weight=torch.ones(2)),
        ),
        (ValueError, r"prior_weight must be >= 0, got -1", dict(prior=PRIOR, prior_weight=-1)),
        (
            ValueError,
            r"prior_weight has 3 values for a batch of 2",
            dict(prior=PRIOR, prior_weight=[1, 2, 3], config=PER_SAMPLE),
        ),
        (ValueError, r"normalizer must be > 0, got 0", dict(normalizer=0)),
        (TypeError, r"normalizer must be a number or a 0-d tensor, got str", dict(normalizer="4")),
        (
            ValueError,
            r"normalizer must be a number or a 0-d tensor, got a tensor of shape \(2,\)",
            dict(normalizer=torch.ones(2)),
        ),
        (
            ValueError,
            r"normalizer must be a pair \(sum of target weights, sum of prior weights\)",
            dict(prior=PRIOR, normalizer=3.0),
        ),
        (ValueError, r"normalizer must be one number for this call, got 2", dict(normalizer=(3.0, 4.0))),
        (
            ValueError,
            r"area_scale_beta.*per_sample=True",
            dict(normalizer=3.0, config=MaskedLossConfig(area_scale_beta=1.0)),
        ),
        (TypeError, r"config must be a MaskedLossConfig, got dict", dict(config={"gamma": 2.0})),
        (
            ValueError,
            r"backend must be one of 'auto', 'triton', 'torch', 'reference', got 'cuda'",
            dict(backend="cuda"),
        ),
        (TypeError, r"unexpected keyword argument 'gamma'", dict(gamma=2.0)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_call_is_one_clear_error(error, match, call):
    rejects(error, match, **call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_bytes_as_floats_are_an_error_and_not_a_mask_of_ones(dtype):
    """The values of a picture without its division by 255: clamped, even its black would be weight 1."""
    mask = torch.randint(1, 256, (2, 5, 7)).to(dtype)
    mask[0, 0, 0] = 255
    match = r"mask is floating with a largest value of 255, but floating masks are in \[0, 1\]: divide it by 255"
    rejects(ValueError, match, mask=mask)
    with pytest.raises(ValueError, match=match):
        mask_weights(mask, shape=(2, 1, 5, 7))
    for right in (mask / 255 * 1.01, mask.to(torch.uint8), torch.full((2, 5, 7), float("inf"))):
        masked_loss(PRED, torch.zeros_like(PRED), right)


def test_a_bad_sign_of_a_flow_target():
    with pytest.raises(ValueError, match=r"FlowTarget.sign must be 1 .* or -1 .*, got 2"):
        FlowTarget(PRED, PRED, sign=2)


def test_a_module_takes_a_config_or_options():
    with pytest.raises(ValueError, match=r"a config or options, not both; got a config and gamma"):
        MaskedLoss(MaskedLossConfig(), gamma=2.0)
    with pytest.raises(ValueError, match=r"backend must be one of"):
        MaskedLoss(backend="cuda")


def test_a_config_is_a_config_everywhere():
    for call in (lambda: MaskedLoss({"gamma": 0.7}), lambda: mask_weights(MASK, {"gamma": 0.7}, shape=(2, 1, 5, 7))):
        with pytest.raises(TypeError, match="config must be a MaskedLossConfig, got dict"):
            call()


def test_mask_weights_checks_its_shape():
    with pytest.raises(TypeError, match=r"shape must be \(B, F, H, W\), got int"):
        mask_weights(MASK, shape=5)
    with pytest.raises(ValueError, match=r"shape must be \(B, F, H, W\) of positive integers, got \(2, 5, 7\)"):
        mask_weights(MASK, shape=(2, 5, 7))
    with pytest.raises(ValueError, match=r"mask must have batch size 3"):
        mask_weights(MASK, shape=(3, 1, 5, 7))
    with pytest.raises(ValueError, match=r"prior_gate must hold one number per sample"):
        mask_weights(MASK, shape=(2, 1, 5, 7), prior_gate=torch.ones(3))


def test_triton_without_a_device_says_what_to_use(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rejects(
        ValueError,
        r"backend='triton' needs a CUDA or ROCm tensor, and pred is on cpu: use backend='torch'",
        backend="triton",
    )
