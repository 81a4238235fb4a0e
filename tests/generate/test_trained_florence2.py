"""A real Florence-2, tiny and trained on shapes and words (train_florence2.py), and the tiny SAM 2, through the real command.

It shows that words, boxes, sizes and the order of pictures arrive where they should, and not how good the real weights are.
"""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.cli import main
from tests.generate.shapes import draw, iou, scene

pytest.importorskip("transformers")
from tests.generate import tiny

SIDE = tiny.TRAINED_SIDE


def red_and_blue(rng: np.random.Generator):
    """A picture of one red and one blue thing."""
    while True:
        picture, things = scene(rng, SIDE)
        found = {one.colour: one for one in things}
        if set(found) == {"red", "blue"}:
            return picture, found


def summary(reached: list[float]) -> str:
    """The mean, and how many were not found."""
    return f"IoU {np.mean(reached):.2f}, {sum(one < 0.1 for one in reached)} not found"


def test_words_become_masks_of_the_things_they_name(folder, tmp_path):
    rng, truth = np.random.default_rng(3001), {}
    for number in range(16):
        picture, truth[f"{number:02}"] = red_and_blue(rng)
        Image.fromarray(picture).save(folder / "in" / f"{number:02}.png")
    models = ["--florence2_model", tiny.trained_florence2(tmp_path / "florence2")]
    models += ["--sam2_model", tiny.trained_sam2(tmp_path / "sam2")]
    paths = ["--images", folder / "in", "--masks", folder / "out", "--sheet_limit", "0", "--device", "cpu"]
    flags = ["generate", *paths, "--backend", "florence2+sam2", *models, "--text_prompt", "red", "blue=0.5"]
    assert main([str(flag) for flag in flags]) == 0
    reached, other = [], []
    for name, things in truth.items():
        with Image.open(folder / "out" / f"{name}.png") as made:
            mask = np.asarray(made)
        for grey, colour, wrong in ((255, "red", "blue"), (128, "blue", "red")):
            reached.append(iou(mask == grey, things[colour].mask))
            other.append(iou(mask == grey, things[wrong].mask))
    print(f"Florence-2 and SAM 2, {len(reached)} things: {summary(reached)}")
    assert np.mean(reached) > 0.75, reached
    assert np.mean(other) < 0.05, "the word chooses the thing"


def test_its_boxes_are_about_the_things(tmp_path):
    """Without a segmenter, which could mend them."""
    from masked_loss_triton.generate import florence2
    from masked_loss_triton.generate.prompts import MaskRequest, Prompt

    request = MaskRequest(prompts=(Prompt("red"), Prompt("blue")))
    model = str(tiny.trained_florence2(tmp_path / "florence2"))
    detector = florence2.load(request, device="cpu", dtype="float32", batch_size=8, florence2_model=model)
    rng = np.random.default_rng(3002)
    pictures, things = zip(*(red_and_blue(rng) for _ in range(16)), strict=True)
    reached = []
    for answers, found in zip(detector.detect(pictures, ["red", "blue"]), things, strict=True):
        for detections, colour in zip(answers, ("red", "blue"), strict=True):
            given = [max(detections, key=lambda one: one.score).box] if detections else [(0, 0, 0, 0)]
            boxes = [draw(SIDE, "square", tuple(map(round, box))) for box in (*given, found[colour].box)]
            reached.append(iou(*boxes))
    print(f"Florence-2, {len(reached)} boxes: {summary(reached)}")
    assert np.mean(reached) > 0.65, reached
