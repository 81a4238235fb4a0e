"""Trains the tiny SAM 3 of `tiny_sam3.py` on shapes and the words of their colours; a few minutes of one core.

python -m tests.generate.train_sam3        # writes tests/generate/trained_sam3.safetensors
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from tests.generate import tiny_sam3
from tests.generate.shapes import COLOURS, scene
from tests.generate.tiny import save_weights
from tests.generate.training import fit

SIDE = tiny_sam3.SIDE


def lesson(rng):
    """A picture, a colour, and the boxes, fractions of the picture, and masks of the things that have it; perhaps none."""
    picture, things = scene(rng, SIDE)
    here, colours = [one.colour for one in things], list(COLOURS)
    word = str(rng.choice(here if rng.random() < 0.7 else colours))
    wanted = [one for one in things if one.colour == word]
    boxes = torch.tensor([one.box for one in wanted]).float().reshape(-1, 4) / SIDE
    masks = torch.tensor(np.array([one.mask for one in wanted])).float().reshape(-1, SIDE, SIDE)
    return picture, word, boxes, masks


def mask_loss(logits, truth):
    """Cross entropy and dice of masks, (N, H, W): (N)."""
    share = logits.sigmoid()
    dice = 1 - (2 * (share * truth).sum((-1, -2)) + 1) / ((share + truth).sum((-1, -2)) + 1)
    return functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((-1, -2)) + dice


def picture_loss(logits, present, boxes, masks, true_boxes, true_masks):
    """The loss of one picture, whose queries are given to the things that suit them best, and the IoU it reached."""
    count = len(true_boxes)
    shown = functional.interpolate(masks[None], size=(SIDE, SIDE), mode="bilinear")[0]
    costs = [
        mask_loss(shown, mask.expand_as(shown)) + 5 * (boxes - box).abs().sum(-1)
        for box, mask in zip(true_boxes, true_masks, strict=True)
    ]
    with torch.no_grad():
        best = min(
            itertools.permutations(range(len(logits)), count),
            key=lambda order: sum(float(cost[query] - logits[query]) for cost, query in zip(costs, order, strict=True)),
        )
    wanted = torch.zeros_like(logits)
    wanted[list(best)] = 1
    loss = functional.binary_cross_entropy_with_logits(present, torch.full_like(present, float(count > 0)))
    if count:  # where nothing is there, that it is absent is all to learn
        loss = loss + 2 * functional.binary_cross_entropy_with_logits(logits, wanted)
    loss = loss + sum(cost[query] for cost, query in zip(costs, best, strict=True))
    found = shown[list(best)] > 0
    union = (found | (true_masks > 0)).sum((-1, -2)).clamp(min=1)
    reached = (found & (true_masks > 0)).sum((-1, -2)) / union
    return loss, reached.tolist()


def train(folder: Path, steps: int, seed: int = 0):
    """Trains the model of a folder; returns it."""
    from transformers import Sam3Model, Sam3Processor

    model, processor = Sam3Model.from_pretrained(folder).eval(), Sam3Processor.from_pretrained(folder)
    # transformers' own beginning, 0.02 for everything, is for wide models.
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.reset_parameters()
    rng = np.random.default_rng(seed)

    def lessons():
        batch = [lesson(rng) for _ in range(8)]
        inputs = processor(images=[one[0] for one in batch], text=[one[1] for one in batch], return_tensors="pt")
        inputs.pop("original_sizes")
        out = model(**inputs)
        answers = zip(out.pred_logits, out.presence_logits, out.pred_boxes, out.pred_masks, strict=True)
        losses, overlaps, right = [], [], []
        for answer, (_, _, *truth) in zip(answers, batch, strict=True):
            loss, reached = picture_loss(*answer, *truth)
            losses.append(loss)
            overlaps += reached
            right.append((float(answer[1]) > 0) == (len(truth[0]) > 0))
        loss = torch.stack([loss.squeeze() for loss in losses]).mean()
        return loss, {"IoU": overlaps, "there or not": right}

    fit(model, 1.5e-3, steps, lessons)
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=tiny_sam3.TRAINED)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        save_weights(train(tiny_sam3.pictures_sam3(Path(place)), args.steps), args.output)
