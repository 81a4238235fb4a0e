"""Detects what words name by Florence-2, which answers in text: a phrase, then its boxes as four location tokens each.

Two tasks: open-vocabulary detection takes the words as one thing; phrase grounding finds each phrase in them.
Source: transformers, models/florence2; the weights are those of florence-community on the Hugging Face hub.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from masked_loss_triton.generate.backends import Box, Detection
from masked_loss_triton.generate.models import load_pretrained
from masked_loss_triton.generate.prompts import MaskRequest

MODEL = "florence-community/Florence-2-large"
TASKS = {"detection": "<OPEN_VOCABULARY_DETECTION>", "grounding": "<CAPTION_TO_PHRASE_GROUNDING>"}
MAX_NEW_TOKENS = 512  # some eighty boxes; an answer that goes on longer has lost its way
BINS = 1000  # location tokens for each side of the picture
SURE = 20  # bins: what is that near the edge that was chosen counts as the same edge


def add_arguments(group: Any) -> None:
    """Adds the flags of model, task and beams."""
    group.add_argument("--florence2_model", default=MODEL, metavar="NAME", help=f"on the hub, or a folder ({MODEL})")
    group.add_argument(
        "--florence2_task",
        choices=tuple(TASKS),
        default="detection",
        help="detection (default) takes each prompt as one thing, grounding finds every phrase in it",
    )
    group.add_argument("--florence2_beams", type=int, default=3, metavar="N", help="of the text search (3)")


def load(
    request: MaskRequest,
    *,
    device: str,
    dtype: str,
    batch_size: int,
    florence2_model: str = MODEL,
    florence2_task: str = "detection",
    florence2_beams: int = 3,
) -> Florence2Detector:
    """Loads the model of --florence2_model.

    Raises:
        UserError: see `load_pretrained`.
    """
    model, processor = load_pretrained(
        florence2_model,
        "Florence2ForConditionalGeneration",
        "Florence2Processor",
        ("florence2",),
        "--florence2_model",
        device,
        dtype,
    )
    return Florence2Detector(model, processor, TASKS[florence2_task], max(1, florence2_beams), batch_size)


class Florence2Detector:
    """See `Detector`.

    Args:
        model: Florence2ForConditionalGeneration.
        processor: Florence2Processor.
        task: one of TASKS' values.
        beams: of the search.
        batch_size: pairs of picture and words that are answered at once.
    """

    def __init__(self, model: Any, processor: Any, task: str, beams: int, batch_size: int) -> None:
        self.model, self.processor, self.task = model, processor, task
        self.beams, self.batch_size = beams, batch_size
        self.lock = threading.Lock()  # the model is used by one thread at a time; the others read and write files
        tokens = processor.tokenizer.convert_tokens_to_ids([f"<loc_{number}>" for number in range(BINS)])
        self.locations = {token: number for number, token in enumerate(tokens)}
        self.marks = {*tokens, *processor.tokenizer.convert_tokens_to_ids(["<sep>", "<poly>", "</poly>"])}

    def detect(self, pictures: Sequence[np.ndarray], words: Sequence[str]) -> list[list[list[Detection]]]:
        """See `Detector`. The score is how sure the model is where the box is, not whether the thing is there."""
        pairs = [(picture, one) for picture in pictures for one in words]
        found: list[list[Detection]] = []
        for start in range(0, len(pairs), self.batch_size):
            found += self._answer(pairs[start : start + self.batch_size])
        return [found[index : index + len(words)] for index in range(0, len(found), len(words))]

    def _answer(self, pairs: list[tuple[np.ndarray, str]]) -> list[list[Detection]]:
        import torch

        inputs = self.processor(
            text=[self.task + words for _, words in pairs],
            images=[picture for picture, _ in pairs],
            padding=True,
            return_tensors="pt",
        ).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        with self.lock, torch.inference_mode():
            sequences = self.model.generate(
                **inputs, max_new_tokens=MAX_NEW_TOKENS, num_beams=self.beams, do_sample=False
            )
            sure = self._sure(inputs, sequences)
        sizes = [(picture.shape[1], picture.shape[0]) for picture, _ in pairs]
        return [
            list(self.parse(tokens, certainty, size))
            for tokens, certainty, size in zip(sequences.tolist(), sure.tolist(), sizes, strict=True)
        ]

    def _sure(self, inputs: Any, sequences: Any) -> Any:
        """For each token of the answers, (B, L) float32: the probability of a location within `SURE` bins of this one.

        The generated answer goes through the decoder once more, all tokens at a time: the scores of a beam search would need
        the whole vocabulary at every step in memory.
        """
        import torch

        logits = self.model(**inputs, decoder_input_ids=sequences[:, :-1]).logits.float()
        ids = torch.tensor(list(self.locations), device=logits.device)
        near = torch.nn.functional.pad((logits.log_softmax(-1)[..., ids]).exp(), (SURE + 1, SURE)).cumsum(-1)
        mass = near[..., 2 * SURE + 1 :] - near[..., :BINS]
        bins = torch.full((logits.shape[-1],), 0, device=logits.device)
        bins[ids] = torch.arange(BINS, device=logits.device)
        chosen = mass.gather(-1, bins[sequences[:, 1:]][..., None])[..., 0]
        return torch.nn.functional.pad(chosen, (1, 0)).clamp(0, 1)

    def parse(self, tokens: Sequence[int], sure: Sequence[float], size: tuple[int, int]) -> Iterator[Detection]:
        """The boxes in an answer, each once.

        Args:
            tokens: the generated ids.
            sure: for each token that is a location, how sure the model is of it.
            size: (width, height) of the picture, pixels.
        """
        seen: set[Box] = set()
        for phrase in self._phrases(tokens):
            text = self.processor.tokenizer.decode([tokens[index] for index in phrase], skip_special_tokens=False)
            parsed = self.processor.post_process_generation(text, task=self.task, image_size=size)[self.task]
            certainty = [sure[index] for index in phrase if tokens[index] in self.locations]
            boxes = [(tuple(box), certainty[4 * n : 4 * n + 4]) for n, box in enumerate(parsed.get("bboxes", []))]
            boxes += [(_bounds(polygons), certainty) for polygons in parsed.get("polygons", [])]
            for box, probabilities in boxes:
                if box in seen or box[2] <= box[0] or box[3] <= box[1]:
                    continue
                seen.add(box)
                yield Detection(box, float(np.exp(np.log(np.maximum(probabilities, 1e-9)).mean())))

    def _phrases(self, tokens: Sequence[int]) -> Iterator[list[int]]:
        """The positions of the tokens of each phrase, its words and then its locations.

        The processor reads phrases one at a time, so that its boxes can be put beside the certainty of their tokens.
        """
        phrase: list[int] = []
        for index, token in enumerate(tokens):
            if phrase and token not in self.marks and tokens[phrase[-1]] in self.marks:
                yield phrase
                phrase = []
            phrase.append(index)
        yield phrase


def _bounds(polygons: Sequence[Sequence[float]]) -> Box:
    xs = [x for polygon in polygons for x in polygon[0::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return (min(xs), min(ys), max(xs), max(ys)) if xs else (0, 0, 0, 0)
