"""Segments by SAM 2: cuts out what is in a box of a picture, and follows it through a clip.

Source: transformers, models/sam2 and models/sam2_video; the weights are Meta's. One repository serves both models.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from masked_loss_triton.generate.backends import Box, Cutout
from masked_loss_triton.generate.models import load_pretrained
from masked_loss_triton.generate.prompts import MaskRequest

MODEL = "facebook/sam2.1-hiera-large"
MODEL_TYPES = ("sam2_video", "sam2")


def add_arguments(group: Any) -> None:
    """Adds the flag of the model."""
    group.add_argument("--sam2_model", default=MODEL, metavar="NAME", help=f"on the hub, or a folder ({MODEL})")


def load(request: MaskRequest, *, device: str, dtype: str, batch_size: int, sam2_model: str = MODEL) -> Sam2Segmenter:
    """Loads the model of --sam2_model; the one for clips is loaded when the first clip comes.

    Raises:
        UserError: see `load_pretrained`.
    """
    return Sam2Segmenter(sam2_model, device, dtype)


class Sam2Segmenter:
    """See `Segmenter`. One thread uses the model while two others read and write files."""

    workers = 3
    remembers = False

    def __init__(self, model: str, device: str, dtype: str) -> None:
        self.name, self.device, self.dtype = model, device, dtype
        self.lock = threading.Lock()
        self.model, self.processor = self._load("Sam2Model", "Sam2Processor")
        self.video: tuple[Any, Any] | None = None

    def _load(self, model_class: str, processor_class: str) -> tuple[Any, Any]:
        return load_pretrained(
            self.name, model_class, processor_class, MODEL_TYPES, "--sam2_model", self.device, self.dtype
        )

    def segment(self, pictures: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[list[Cutout]]:
        """See `Segmenter`. The score is SAM 2's own estimate of the mask's IoU."""
        results: list[list[Cutout]] = [[] for _ in pictures]
        busy = [index for index, inside in enumerate(boxes) if inside]
        if busy:
            cutouts = self._segment([pictures[index] for index in busy], [list(boxes[index]) for index in busy])
            for index, found in zip(busy, cutouts, strict=True):
                results[index] = found
        return results

    def _segment(self, pictures: list[np.ndarray], boxes: list[list[Box]]) -> list[list[Cutout]]:
        import torch

        # The processor wants equally many boxes for every picture. Boxes do not see each other, so the last one is repeated,
        # which costs little: the picture's encoder does most of the work.
        most = max(map(len, boxes))
        padded = [[list(map(float, box)) for box in one + one[-1:] * (most - len(one))] for one in boxes]
        inputs = self.processor(images=pictures, input_boxes=padded, return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        results = []
        with self.lock, torch.inference_mode():
            # A box says what is meant well enough for one mask; the three of multimask_output are for single points.
            out = self.model(
                pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"], multimask_output=False
            )
            for index, one in enumerate(boxes):
                height, width = pictures[index].shape[:2]
                cutouts = []
                for number in range(len(one)):
                    # One after the other: at the picture's size in float32 they may not fit together.
                    low = out.pred_masks[index, number][None].float()
                    mask = self.processor.post_process_masks([low], [[height, width]])[0][0, 0]
                    score = float(out.iou_scores[index, number, 0].float().clamp(0, 1))
                    cutouts.append(Cutout(mask.cpu().numpy(), score))
                results.append(cutouts)
        return results

    def at_points(
        self,
        picture: np.ndarray,
        points: Sequence[tuple[float, float]],
        positive: Sequence[bool],
        box: Box | None = None,
    ) -> np.ndarray:
        """Cuts out what points of a picture and a box say.

        Args:
            picture: (H, W, 3) uint8.
            points: (x, y), pixels; may be empty where there is a box.
            positive: whether the subject is at each point.
            box: left, top, right, bottom, pixels.

        Returns:
            (H, W) bool. A single point can mean a part or the whole: of SAM 2's three answers the one it trusts most.
        """
        import torch

        said: dict[str, Any] = {}
        if points:
            said["input_points"] = [[[list(map(float, point)) for point in points]]]
            said["input_labels"] = [[[int(one) for one in positive]]]
        if box is not None:
            said["input_boxes"] = [[list(map(float, box))]]
        inputs = self.processor(images=[picture], return_tensors="pt", **said).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        sizes = inputs.pop("original_sizes")
        with self.lock, torch.inference_mode():
            out = self.model(**inputs, multimask_output=len(points) == 1 and box is None)
        best = int(out.iou_scores[0, 0].float().argmax())
        low = out.pred_masks[0, 0, best][None, None].float()
        return self.processor.post_process_masks([low], sizes)[0][0, 0].cpu().numpy()

    def follow(self, frames: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """See `Segmenter`. The masks of the first frame are SAM 2's memory; they come back as they are."""
        import torch

        yield list(masks)
        if len(frames) == 1:
            return
        height, width = frames[0].shape[:2]
        with self.lock, torch.inference_mode():
            if self.video is None:
                self.video = self._load("Sam2VideoModel", "Sam2VideoProcessor")
            model, processor = self.video
            session = processor.init_video_session(video=list(frames), inference_device=model.device, dtype=model.dtype)
            processor.add_inputs_to_inference_session(
                session, frame_idx=0, obj_ids=list(range(len(masks))), input_masks=list(masks)
            )
            followed = []
            for out in model.propagate_in_video_iterator(session, start_frame_idx=0):
                if out.frame_idx:
                    low = out.pred_masks.float()
                    full = processor.post_process_masks([low], [[height, width]])[0][:, 0]
                    followed.append(np.packbits(full.cpu().numpy(), axis=-1))
        for packed in followed:
            yield list(np.unpackbits(packed, axis=-1, count=width).astype(bool))
