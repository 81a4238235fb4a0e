"""Frames that are given and not generated: which they are, and that with `ignore` the loss is that of the others alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.errors import UserError
from masked_loss_triton.integration.musubi.given import at_frames, generated_frames
from tests.cache.support import Lab, disc
from tests.integration.musubi.small_trainer import MethodTrainer, trained
from tests.support.caches import add_text


def conditioning(frames, marked, channels=16, family="wan"):
    """latents_image as musubi-tuner caches it: WAN's four marks stand before, HunyuanVideo 1.5's one behind."""
    marks = torch.zeros(1, 4 if family == "wan" else 1, frames, 8, 8)
    marks[:, :, marked] = 1
    image = torch.randn(1, channels, frames, 8, 8)
    return torch.cat([marks, image] if family == "wan" else [image, marks], 1)


def test_which_frames_are_generated_is_read_from_the_trainers_own_conditioning():
    def found(family, frames, marked, image_to_video=True):
        batch = {"latents": torch.zeros(1, 16, frames, 8, 8)}
        if marked is not None:
            batch["latents_image"] = conditioning(frames, marked, family=family)
        return generated_frames(batch, FAMILIES[family], image_to_video)

    assert found("wan", 5, [0]) == found("hv15", 5, [0]) == found("hv", 5, None) == [1, 2, 3, 4]
    assert found("wan", 5, [0, 4]) == [1, 2, 3]  # first and last frame
    assert found("wan", 3, [0, 2]) == [1]  # one frame between control frames
    assert found("wan", 5, [0], image_to_video=False) is None
    assert found("wan", 1, [0]) is None  # a picture: nothing else would be left
    assert found("framepack", 5, None) is None  # its sections begin after what is given
    partly = conditioning(3, [0])
    partly[:, 1:3, 2] = 1
    batch = {"latents": torch.zeros(1, 16, 3, 8, 8), "latents_image": partly}
    assert generated_frames(batch, FAMILIES["wan"], True) == [1, 2]
    both = torch.cat([conditioning(3, [0]), conditioning(3, [2])])
    with pytest.raises(UserError, match="are given different frames; use keep"):
        generated_frames({"latents": torch.zeros(2, 16, 3, 8, 8), "latents_image": both}, FAMILIES["wan"], True)


def test_frames_that_follow_each_other_are_a_view():
    x = torch.randn(2, 3, 5, 4, 4)
    assert at_frames(x, [1, 2, 3]).data_ptr() == x[:, :, 1].data_ptr()
    assert torch.equal(at_frames(x, [0, 2, 4]), x[:, :, ::2])
    assert torch.equal(at_frames(x, [1, 2], "layered"), x[:, 1:3])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips of five latent frames, with a still mask."""
    lab = Lab(tmp_path_factory.mktemp("clips"))
    lab.write_toml(kind="video")
    for stem in "ab":
        Image.fromarray(disc((128, 128))).save(lab.masks / f"{stem}.png")
        lab.add_cache(f"{stem}_00000-017", (128, 128), frames=5)
        add_text(lab, f"{stem}_00000-017", 5)
    assert lab.run("cache", "--masks", lab.masks) == 0
    return lab


@pytest.mark.parametrize("prior", [[], ["--inverted_mask_prior"]])
def test_ignored_frames_weigh_nothing_in_either_term(clips, monkeypatch, prior):
    class ImageToVideo(MethodTrainer):
        i2v_training = True

        def batches(self, args):
            more = {"latents_image": conditioning(5, [0]).expand(2, -1, -1, -1, -1)}
            return [{**batch, **more} for batch in super().batches(args)]

    monkeypatch.setattr("tests.integration.musubi.small_trainer.GENERATIONS", {"method": ImageToVideo})
    given = {"trackers": [object()], "max_train_steps": 2, "learning_rate": 1.0}
    trainer = trained("method", clips, "--use_mask_loss", "--mask_given_frames", "ignore", *prior, **given)
    step, output = trainer.output.extra["masked_loss"], trainer.output
    assert step.frames == [1, 2, 3, 4]
    assert not output.pred.grad[:, :, 0].any()
    assert output.pred.grad[:, :, 1:].any()
    m = step.mask.double().expand(-1, 16, -1, -1, -1)

    def mean(weight, other):
        return float((weight * (output.pred.detach() - other)[:, :, 1:].double() ** 2).sum() / weight.sum())

    expected = mean(m, output.target) + (0.5 * mean(1 - m, step.prior) if prior else 0)
    assert trainer.losses[-1] == pytest.approx(expected, rel=1e-6)
    assert trainer.logs[-1]["mask/error_inside"] == pytest.approx(mean(m, output.target), rel=1e-6)
    shown = np.asarray(Image.open(clips.toml.parent / "out" / "lora_first_items.png"))
    assert shown.size
    keep = trained("method", clips, "--use_mask_loss", *prior, **given)
    assert keep.losses[0] != trainer.losses[0]


def test_it_is_said_where_nothing_is_given(clips, capsys):
    trained("method", clips, "--use_mask_loss", "--mask_given_frames", "ignore", max_train_steps=1)
    assert "--mask_given_frames ignore does nothing: this training is given no frames" in capsys.readouterr().out
