"""What a run shows of itself: the picture of its first items, and the lines when masks do not work."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from masked_loss_triton import MaskedLossConfig, mask_weights
from masked_loss_triton.files import contact_sheet
from masked_loss_triton.integration.musubi.watch import Watch
from masked_loss_triton.stats import MaskedLossStats
from tests.integration.musubi.small_trainer import trained
from tests.support.caches import caches


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return caches(tmp_path_factory.mktemp("lab"), "wan", "disc", "abce")


class Tracker:
    name = "wandb"

    def __init__(self):
        self.pictures = []

    def log_images(self, values, step):
        (picture,) = values["mask/first_items"]
        self.pictures.append((picture, step))


def test_the_first_items_are_shown_with_the_weights_that_reach_the_loss(lab, monkeypatch, capsys):
    cards = []
    draw = contact_sheet.draw
    monkeypatch.setattr(contact_sheet, "draw", lambda card: cards.append(card) or draw(card))
    tracker, config = Tracker(), MaskedLossConfig(gamma=0.5, min_weight=0.1)
    flags = ["--use_mask_loss", "--inverted_mask_prior", "--mask_gamma", 0.5, "--mask_min_weight", 0.1]
    trained("method", lab, *flags, trackers=[tracker])
    assert [card.name for card in cards] == ["a", "b", "c", "e", "a", "b"]
    for card in cards:
        (mask,) = (
            value
            for name, value in load_file(lab.cache / f"{card.name}_0128x0128_wan.safetensors").items()
            if name.startswith("mask_weights")
        )
        w, v = mask_weights(mask[None], config, shape=(1, *mask.shape[1:]))
        assert np.array_equal(card.raw, mask[0].float())
        assert np.array_equal(card.weights, w[0])
        assert np.array_equal(card.region, v[0])
        pixels = np.asarray(Image.open(lab.images / f"{card.name}.png").convert("RGB"))
        assert np.abs(card.pictures[0].mean((0, 1)) - pixels.mean((0, 1))).max() < 8
    assert [step for _, step in tracker.pictures] == [0, 2]
    file = lab.toml.parent / "out" / "lora_first_items.png"
    assert np.array_equal(np.asarray(Image.open(file)), tracker.pictures[-1][0])
    assert f"the first 6 items and the weights that reach the loss: {file}" in capsys.readouterr().out


def test_the_items_of_a_resumed_run_are_shown_beside_the_first(lab, tmp_path):
    """Trackers get the trainer's own steps, which begin at 0 again: W&B refuses to go back to an older one."""
    folder = {"output_dir": str(tmp_path / "out")}
    trained("method", lab, "--use_mask_loss", max_train_steps=3, state=str(tmp_path / "state"), save_at=2, **folder)
    first = tmp_path / "out" / "lora_first_items.png"
    before = first.read_bytes()
    tracker = Tracker()
    resumed = {"resume": str(tmp_path / "state"), "trackers": [tracker], **folder}
    trained("method", lab, "--use_mask_loss", max_train_steps=6, **resumed)
    assert first.read_bytes() == before
    assert first.with_name("lora_first_items_2.png").exists()
    assert tracker.pictures[0][1] == 0


def test_a_picture_that_cannot_be_written_stops_no_training(lab, capsys):
    (lab.toml.parent / "file").touch()
    trained("method", lab, "--use_mask_loss", output_dir=str(lab.toml.parent / "file"), max_train_steps=1)
    assert "the first items are not shown: " in capsys.readouterr().out


def stats(mean, inside, outside):
    numbers = {"raw_mean": mean, "error_inside": inside, "error_outside": outside}
    return MaskedLossStats(*(torch.tensor(float(numbers.get(name, 0))) for name in MaskedLossStats._fields))


def watched(inside, outside, mean=0.3, total=400):
    """The lines of a run whose errors are `inside(progress)` and `outside(progress)` times those of their timestep."""
    watch, said, random = Watch(total), [], np.random.default_rng(0)
    for step in range(total):
        if step == total // 2:  # saved and resumed
            saved, watch = json.dumps(watch.state()), Watch(total)
            watch.load(json.loads(saved))
        timestep = random.random()
        level = (2 - 1.8 * timestep) * random.normal(1, 0.1)
        progress = step / total
        said += watch.add(
            torch.tensor([1000 * timestep]), stats(mean, level * inside(progress), level * outside(progress))
        )
    return said


def test_errors_that_fall_or_stay_are_not_worth_a_line():
    assert watched(lambda progress: 1 - 0.3 * progress, lambda progress: 1 + 0.2 * progress) == []
    assert watched(lambda progress: 1 - 0.3 * progress, lambda progress: 0.0, mean=1.0) == []


def test_what_goes_wrong_is_said_once():
    (line,) = watched(lambda progress: 1 + 0.1 * progress, lambda progress: 1.0)
    assert line.startswith("the error inside the masks does not fall: it is 1.0")
    (line,) = watched(lambda progress: 1 - 0.3 * progress, lambda progress: 1 + 2 * progress)
    assert line.startswith("the error outside the masks runs away: it is 1.")
    assert watched(lambda progress: 1 + 0.1 * progress, lambda progress: 1 + progress, total=40) == []
