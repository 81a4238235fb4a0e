"""Trains the tiny Florence-2 of `tiny.py` to find shapes by the word of their colour; some minutes of one core.

python -m tests.generate.train_florence2        # writes tests/generate/trained_florence2.safetensors
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from tests.generate.shapes import COLOURS, Box, Thing, scene
from tests.generate.tiny import TRAINED_FLORENCE2, TRAINED_SIDE, save_weights, wider_florence2
from tests.generate.training import fit

TASK = "<OPEN_VOCABULARY_DETECTION>"
BINS = 1000
BATCH = 32
LEARNING_RATE = 2e-3
# Bins, the spread of what counts as right: an edge one bin off is nearly right, which a plain cross entropy does not know.
SPREAD = 12.0
# Of the boxes that are read from the picture beside the words.
SEEN = 10.0


def lesson(rng: np.random.Generator) -> tuple[np.ndarray, str, list[Box], list[Thing]]:
    """A picture, the colour of a thing in it, the boxes of all that have it, from the left, and all things."""
    picture, things = scene(rng, TRAINED_SIDE)
    word = things[int(rng.integers(len(things)))].colour
    return picture, word, sorted(one.box for one in things if one.colour == word), things


def answer(word: str, boxes: list[Box]) -> str:
    """What Florence-2 says of these boxes: the word, then four locations for each."""
    locations = [min(BINS - 1, edge * BINS // TRAINED_SIDE) for box in boxes for edge in box]
    return word + "".join(f"<loc_{location}>" for location in locations)


def answer_loss(logits: torch.Tensor, labels: torch.Tensor, first: int, padding: int) -> torch.Tensor:
    """Cross entropy of an answer, (B, L, V) and (B, L), where locations near the right one are right in part.

    Args:
        first: the id of location 0; the others follow it.
        padding: the label that counts nothing.
    """
    place = labels - first
    located = (place >= 0) & (place < BINS)
    plain = (labels != padding) & ~located
    loss = functional.cross_entropy(logits[plain], labels[plain], reduction="sum")
    bins = torch.arange(BINS)
    near = (-0.5 * ((bins - place[located][:, None]) / SPREAD) ** 2).softmax(-1)
    chances = logits[located].log_softmax(-1)[:, first : first + BINS]
    return (loss - (near * chances).sum()) / (labels != padding).sum()


def seen_loss(seen: torch.Tensor, scenes: Sequence[list[Thing]]) -> torch.Tensor:
    """How far the boxes that a linear layer reads from the picture's first token, (B, colours, 4), are from the true ones, as
    fractions of the picture, over the colours that one thing alone has.

    The words alone taught the vision tower nothing in ten minutes: edges stayed 121 bins off, and without a picture they are.
    """
    wrong = []
    for boxes, things in zip(seen, scenes, strict=True):
        colours = [one.colour for one in things]
        for one in things:
            if colours.count(one.colour) == 1:
                box = torch.tensor(one.box) / TRAINED_SIDE
                wrong.append((boxes[list(COLOURS).index(one.colour)] - box).abs().mean())
    return torch.stack(wrong).mean()


def train(folder: Path, steps: int, seed: int = 0):
    """Trains the model of a folder; returns it."""
    from transformers import Florence2ForConditionalGeneration, Florence2Processor

    processor = Florence2Processor.from_pretrained(folder)
    model = Florence2ForConditionalGeneration.from_pretrained(folder).eval()
    # transformers' own beginning, 0.02 for everything, is for wide models.
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module is not model.lm_head:
            module.reset_parameters()
        elif isinstance(module, torch.nn.Embedding):
            # Of places too, which beside the features of a picture must not be too faint to be seen.
            torch.nn.init.normal_(module.weight, std=0.5 if module.num_embeddings < BINS else 0.1)
    words = processor.tokenizer
    first, padding = words.convert_tokens_to_ids("<loc_0>"), words.pad_token_id
    start = model.config.text_config.decoder_start_token_id
    tokens: list[torch.Tensor] = []  # of the pictures, as the text part gets them
    model.model.multi_modal_projector.register_forward_hook(lambda _module, _given, result: tokens.append(result))
    reads = torch.nn.Linear(model.config.text_config.d_model, 4 * len(COLOURS))
    rng = np.random.default_rng(seed)

    def lessons():
        pictures, names, boxes, scenes = zip(*(lesson(rng) for _ in range(BATCH)), strict=True)
        inputs = processor(
            text=[TASK + name for name in names], images=list(pictures), padding=True, return_tensors="pt"
        )
        said = [f"<s>{answer(name, found)}</s>" for name, found in zip(names, boxes, strict=True)]
        labels = words(said, padding=True, add_special_tokens=False, return_tensors="pt")["input_ids"]
        heard = torch.cat([torch.full((BATCH, 1), start), labels[:, :-1]], dim=1)
        logits = model(**inputs, decoder_input_ids=heard).logits
        loss = answer_loss(logits, labels, first, padding)
        seen = reads(tokens.pop()[:, 0]).unflatten(-1, (len(COLOURS), 4))
        located = (labels >= first) & (labels < first + BINS)
        best = logits[located][:, first : first + BINS].argmax(-1)
        off = (best - (labels[located] - first)).abs().float().mean().item()
        return loss + SEEN * seen_loss(seen, scenes), {"loss": [loss.item()], "bins off": [off]}

    fit(model, LEARNING_RATE, steps, lessons, beside=reads.parameters())
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--output", type=Path, default=TRAINED_FLORENCE2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        save_weights(train(wider_florence2(Path(place)), args.steps), args.output)
