"""Finds what words name and cuts it out in one, by SAM 3: in pictures, and in clips with a memory of what it saw.

Source: transformers, models/sam3 and models/sam3_video; the weights are Meta's. One repository serves both models.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.compose import Instance, choose
from masked_loss_triton.generate.engine import Found, FrameMask, WholeEngine
from masked_loss_triton.generate.models import load_pretrained
from masked_loss_triton.generate.prompts import MaskRequest

MODEL = "facebook/sam3"
MODEL_TYPES = ("sam3_video", "sam3")
THRESHOLD = 0.5  # of the score of a thing, as in Meta's own code, where --min_score says nothing
FRAMES = 128  # of a clip that are in memory at once: 0.8 GB at half precision
MOST_TOKENS = 32  # of a prompt


def add_arguments(group: Any) -> None:
    """Adds the flags of the model and its memory."""
    group.add_argument("--sam3_model", default=MODEL, metavar="NAME", help=f"on the hub, or a folder ({MODEL})")
    group.add_argument(
        "--sam3_frames",
        type=int,
        default=FRAMES,
        metavar="N",
        help=f"frames of a clip that it remembers ({FRAMES}); it looks for things in every frame, whatever --key_interval says",
    )


def load(
    request: MaskRequest,
    *,
    device: str,
    dtype: str,
    batch_size: int = 4,
    sam3_model: str = MODEL,
    sam3_frames: int = FRAMES,
) -> Sam3Engine:
    """Loads the model of --sam3_model; the one for clips is loaded when the first clip comes.

    Raises:
        UserError: see `load_pretrained`; for prompts that are too long.
    """
    if sam3_frames < 2:
        raise UserError(f"--sam3_frames must be 2 or more, got {sam3_frames}", 2)
    return Sam3Engine(request, sam3_model, device, dtype, sam3_frames)


class Sam3Engine(WholeEngine):
    """See `WholeEngine`. One thread uses the model while two others read and write files."""

    workers = 3
    judged = True

    def __init__(self, request: MaskRequest, model: str, device: str, dtype: str, frames: int) -> None:
        super().__init__(request)
        self.name, self.device, self.dtype, self.frames = model, device, dtype, frames
        self.threshold = request.min_score or THRESHOLD
        self.lock = threading.Lock()
        self.model, self.processor = self._load("Sam3Model", "Sam3Processor")
        self.video: tuple[Any, Any] | None = None
        for words in request.words:
            tokens = len(self.processor.tokenizer(words)["input_ids"])
            if tokens > MOST_TOKENS:
                raise UserError(
                    f'--text_prompt "{words}" has {tokens} tokens, SAM 3 reads {MOST_TOKENS}: shorten it', 2
                )

    def _load(self, model_class: str, processor_class: str) -> tuple[Any, Any]:
        return load_pretrained(
            self.name, model_class, processor_class, MODEL_TYPES, "--sam3_model", self.device, self.dtype
        )

    def find(self, picture: np.ndarray, source: Path) -> Found:
        """See `WholeEngine`."""
        return self.find_in([picture])[0]

    def masks(self, pictures: Sequence[np.ndarray], sources: Sequence[Path]) -> list[FrameMask]:
        """See `WholeEngine`."""
        return [self.mask_of(picture, found) for picture, found in zip(pictures, self.find_in(pictures), strict=True)]

    def find_in(self, pictures: Sequence[np.ndarray]) -> list[Found]:
        """Finds what is in each picture, (H, W, 3) uint8, and chooses the instances that count."""
        import torch

        pixels = self.processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        sizes = [picture.shape[:2] for picture in pictures]
        found: list[Found] = [{} for _ in pictures]
        with self.lock, torch.inference_mode():
            # The pictures go through the encoder once for all the words.
            seen = self.model.get_vision_features(pixel_values=pixels.to(self.model.device, self.model.dtype))
            for words in self.request.words:
                text = self.processor(text=[words] * len(pictures), return_tensors="pt").to(self.model.device)
                out = self.model(vision_embeds=seen, input_ids=text["input_ids"], attention_mask=text["attention_mask"])
                results = self.processor.post_process_instance_segmentation(out, self.threshold, target_sizes=sizes)
                for one, result, size in zip(found, results, sizes, strict=True):
                    instances = [
                        _instance(*parts, size)
                        for parts in zip(result["masks"], result["boxes"], result["scores"], strict=True)
                    ]
                    if chosen := choose(instances, self.request, self._selection(words)):
                        one[words] = chosen
        return found

    def _selection(self, words: str) -> str:
        return "all" if words in self.request.exclude else self.request.select

    def masks_of_clip(self, frames: Iterable[np.ndarray], source: Path) -> Iterator[FrameMask]:
        """Makes the mask of each frame, in order; at most `frames` of them are in memory."""
        waiting = iter(frames)
        while chunk := list(itertools.islice(waiting, self.frames)):
            found = self._follow(chunk)
            yield from (self.mask_of(frame, one) for frame, one in zip(chunk, self._choose(found), strict=True))

    def _follow(self, frames: list[np.ndarray]) -> list[dict[str, dict[int, Packed]]]:
        """The things in each frame, by their words and the number that SAM 3 gave them."""
        import torch

        size = frames[0].shape[:2]
        tracks = []
        with self.lock, torch.inference_mode():
            model, processor = self._video()
            session = processor.init_video_session(
                video=frames, inference_device=model.device, video_storage_device="cpu", dtype=model.dtype
            )
            processor.add_text_prompt(session, list(self.request.words))
            for out in model.propagate_in_video_iterator(session):
                result = processor.postprocess_outputs(session, out)
                answers = (result["object_ids"].tolist(), result["masks"], result["boxes"], result["scores"])
                things = {
                    number: _instance(mask, box, score, size) for number, mask, box, score in zip(*answers, strict=True)
                }
                tracks.append(
                    {
                        words: {number: Packed(things[number]) for number in numbers}
                        for words, numbers in result["prompt_to_obj_ids"].items()
                    }
                )
        return tracks

    def _video(self) -> tuple[Any, Any]:
        if self.video is None:
            self.video = self._load("Sam3VideoModel", "Sam3VideoProcessor")
            module: Any = importlib.import_module("transformers.models.sam3_video.modeling_sam3_video")
            # Else it would fetch compiled code from the hub, where the package for that is installed, and run it.
            module.cv_utils_kernel = False
            model = self.video[0]
            model.score_threshold_detection = self.threshold
            if self.request.min_score:
                model.new_det_thresh = self.request.min_score
        return self.video

    def _choose(self, tracks: list[dict[str, dict[int, Packed]]]) -> Iterator[Found]:
        """Chooses the things that count, each as it is where it is largest, and yields them for each frame."""
        largest: dict[str, dict[int, Packed]] = {}
        for by_words in tracks:
            for words, things in by_words.items():
                known = largest.setdefault(words, {})
                for number, thing in things.items():
                    if number not in known or thing.area > known[number].area:
                        known[number] = thing
        kept: dict[str, list[int]] = {}
        for words in self.request.words:
            numbers = list(largest.get(words, {}))
            instances = [largest[words][number].instance() for number in numbers]
            chosen = choose(instances, self.request, self._selection(words))
            kept[words] = [
                number for number, one in zip(numbers, instances, strict=True) if any(one is other for other in chosen)
            ]
        for by_words in tracks:
            there = {
                words: [by_words[words][number].instance() for number in numbers if number in by_words.get(words, {})]
                for words, numbers in kept.items()
            }
            yield {words: instances for words, instances in there.items() if instances}


class Packed:
    """An instance whose mask takes a bit for a pixel: all those of a chunk of a clip are kept."""

    def __init__(self, instance: Instance) -> None:
        self.width, self.area = instance.mask.shape[1], int(instance.mask.sum())
        self.bits, self.box, self.score = np.packbits(instance.mask, axis=-1), instance.box, instance.score

    def instance(self) -> Instance:
        """The instance."""
        mask = np.unpackbits(self.bits, axis=-1, count=self.width).astype(bool)
        return Instance(mask, self.box, self.score, None)


def _instance(mask: Any, box: Any, score: Any, size: tuple[int, int]) -> Instance:
    """Of SAM 3's answer: its mask, (H, W), box and score, tensors; nobody judges the mask by itself."""
    left, top, right, bottom = box.float().tolist()
    height, width = size
    inside = max(0.0, left), max(0.0, top), min(float(width), right), min(float(height), bottom)
    return Instance(mask.bool().cpu().numpy(), inside, float(score.float().clamp(0, 1)), None)
