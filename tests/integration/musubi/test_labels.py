"""Labels in training: weights that change nothing in the caches, and each label in the log."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi.caches import inspect_caches
from masked_loss_triton.integration.musubi.options import MaskOptions
from tests.cache.support import disc
from tests.integration.musubi.small_trainer import trained
from tests.support.caches import caches

LABELS = ("face", "body", "logo")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """a and c have a body with a face in it; b has a plain mask alone, and e nothing."""
    lab = caches(tmp_path_factory.mktemp("lab"), "wan", "none", "abce")
    for stem in "ac":
        Image.fromarray(disc((128, 128), radius=0.4)).save(lab.masks / f"{stem}.body.png")
        Image.fromarray(disc((128, 128), radius=0.15)).save(lab.masks / f"{stem}.face.png")
    Image.fromarray(disc((128, 128), radius=0.2)).save(lab.masks / "b.png")
    assert lab.run("cache", "--masks", lab.masks, "--mask_labels", *LABELS, "--dtype", "float32") == 0
    return lab


def cached(lab, stem):
    (file,) = lab.cache.glob(f"{stem}_0128x0128_wan.safetensors")
    return {name: value[0, 0] for name, value in load_file(file).items() if name.startswith("mask_")}


def cells(pixels):
    return torch.nn.functional.avg_pool2d(torch.as_tensor(pixels, dtype=torch.float64)[None, None], 8)[0, 0]


def test_the_mask_is_the_average_of_the_weighted_pixels(lab):
    """As if a mask with these grey values had been cached: exact also in cells that several labels share."""
    body, face = (disc((128, 128), radius=radius).astype(np.float64) / 255 for radius in (0.4, 0.15))
    weights = {"face": 1.5, "body": 0.7}
    pixels = face * 1.5 + np.minimum(body, 1 - face) * 0.7
    text = " ".join(f"{label}={weight}" for label, weight in weights.items())
    trainer = trained("method", lab, "--use_mask_loss", "--mask_weights", *text.split(), max_train_steps=1)
    step = trainer.output.extra["masked_loss"]
    np.testing.assert_allclose(step.mask[0, 0, 0], cells(pixels / 1.5), atol=2e-6)
    # A plain mask is unlabelled, and weighs 1 of 1.5.
    plain = disc((128, 128), radius=0.2) / 255
    np.testing.assert_allclose(step.mask[1, 0, 0], cells(plain / 1.5), atol=2e-6)


def test_without_weights_every_label_weighs_the_same(lab):
    body = disc((128, 128), radius=0.4) / 255
    np.testing.assert_allclose(cached(lab, "a")["mask_weights_1x16x16_float32"], cells(body), atol=2e-6)
    assert cached(lab, "e")["mask_label_unlabelled_1x16x16_float32"].min() == 1
    without = trained("method", lab, "--use_mask_loss", max_train_steps=1)
    assert torch.equal(
        without.output.extra["masked_loss"].mask[0, 0, 0], cached(lab, "a")["mask_weights_1x16x16_float32"]
    )


def test_the_log_and_the_console_know_the_labels_by_name(lab, capsys):
    flags = ["--use_mask_loss", "--mask_weights", "face=2", "logo=0"]
    trainer = trained("method", lab, *flags, trackers=[object()], max_train_steps=1)
    output = capsys.readouterr().out
    assert "labels weigh, in units of the largest weight: face 1, body 0.5, logo 0, unlabelled 0.5" in output
    assert "(face 3.6%, body 21.6%, logo 0.0%, unlabelled 28.2%)" in output
    logs, shares = trainer.logs[0], trainer.output.extra["masked_loss"].labels
    squares = (trainer.output.pred.detach() - trainer.output.target) ** 2
    for label in ("face", "body", "unlabelled"):
        share = shares[label].expand_as(squares)
        assert logs[f"mask/error_inside_{label}"] == pytest.approx(
            float((share * squares).sum() / share.sum()), rel=1e-5
        )
        assert logs[f"mask/coverage_{label}"] == pytest.approx(float(share.mean()))
    assert "mask/error_inside_logo" not in logs
    assert logs["mask/coverage_logo"] == 0


def test_bad_weights_are_one_line_before_anything_is_loaded(lab):
    def refused(text):
        with pytest.raises(UserError) as error:
            inspect_caches(str(lab.toml), "wan").label_factors(MaskOptions(mask_weights=text))
        return str(error.value)

    assert refused("fce=1") == "--mask_weights: no label 'fce'; there are face, body, unlabelled"
    assert "every label the weight 0" in refused("face=0 body=0 unlabelled=0")
    assert refused("face") == "--mask_weights must be LABEL=WEIGHT with weights >= 0, as face=1.5 body=0.7, got 'face'"
    assert "got 'face=-1'" in refused("face=-1")
    assert "has face twice" in refused("face=1 face=2")
