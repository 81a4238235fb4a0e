"""Masks from clicks and boxes: SAM 2 where its weights are, elsewhere U2-Net and GrabCut, or GrabCut alone. Models load when the
first click comes."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate import saliency, sam2
from masked_loss_triton.generate.grabcut import cut_out_box, grab_cut
from masked_loss_triton.generate.prompts import MaskRequest, Prompt

SIDE = 640  # GrabCut runs on a copy of this longest side
ROUNDS = 3
REACH = 0.15  # of the smaller side: how far round a click the subject is expected, and how far round a mask more of it
CLICK = 0.012  # of the smaller side: radius of what a click says for certain


@dataclasses.dataclass(frozen=True)
class Click:
    """A point of a picture, pixels, and whether the subject is there."""

    x: float
    y: float
    positive: bool


class Selector:
    """Makes masks of clicks. One thread at a time uses the models.

    Args:
        sam2_model: SAM 2's name on the hub, or folder; see `masked_loss_triton.generate.sam2`.
        saliency_model: the ONNX file of U2-Net's family; see `masked_loss_triton.generate.saliency`.
        device: of SAM 2, "auto" for the first there is.
    """

    def __init__(self, sam2_model: str = sam2.MODEL, saliency_model: str = "", device: str = "auto") -> None:
        self.sam2_model, self.saliency_model, self.device = sam2_model, saliency_model, device
        self.lock = threading.Lock()
        self.why_not: list[str] = []

    @functools.cached_property
    def sam2(self) -> sam2.Sam2Segmenter | None:
        """SAM 2, loaded now; None where it cannot be had, and `why_not` says the reason."""
        return self._loaded(sam2, sam2_model=self.sam2_model)

    @functools.cached_property
    def saliency(self) -> saliency.Saliency | None:
        """The network of U2-Net's family, or None as above."""
        return self._loaded(saliency, saliency_model=self.saliency_model)

    def _loaded(self, module: Any, **model: str) -> Any:
        request = MaskRequest(prompts=(Prompt("subject"),))
        try:
            return module.load(request, device=self.device, dtype="auto", batch_size=1, **model)
        except (UserError, ImportError) as error:
            self.why_not.append(str(error))
            return None

    def select(
        self,
        picture: np.ndarray,
        clicks: Sequence[Click],
        box: tuple[float, float, float, float] | None,
        current: np.ndarray,
    ) -> tuple[np.ndarray, str]:
        """Cuts out what the clicks and the box say.

        Args:
            picture: (H, W, 3) uint8.
            clicks: at least one, or a box.
            box: left, top, right, bottom, pixels.
            current: (H, W) uint8, the mask so far, from which GrabCut starts; empty where there is none.

        Returns:
            (H, W) uint8, 0 or 255, and the name of what made it.

        Raises:
            UserError: without clicks and box.
        """
        if not clicks and box is None:
            raise UserError("click on the subject, or draw a box round it")
        with self.lock:
            if self.sam2 is not None:
                points = [(click.x, click.y) for click in clicks]
                found = self.sam2.at_points(picture, points, [click.positive for click in clicks], box)
                return found.astype(np.uint8) * np.uint8(255), "SAM 2"
            guess = self._salient(picture, clicks, box) if current.max() <= 127 else None
            if not clicks and box is not None:
                mask, maker = (cut_out_box(picture, box), "GrabCut") if guess is None else (guess, "U2-Net")
                return mask.astype(np.uint8) * np.uint8(255), maker
            if guess is None:
                return grab_cut_clicks(picture, clicks, box, current), "GrabCut"
            start = guess.astype(np.uint8) * np.uint8(255)
            return grab_cut_clicks(picture, clicks, None, start), "U2-Net and GrabCut"

    def _salient(self, picture: np.ndarray, clicks: Sequence[Click], box: Any) -> np.ndarray | None:
        """What stands out, (H, W) bool, in the box or the picture; None where that is not what the clicks mean."""
        if self.saliency is None:
            return None
        height, width = picture.shape[:2]
        mask = self.saliency.cut_out(picture, box or (0, 0, width, height)).mask
        meant = [
            mask[min(int(click.y), height - 1), min(int(click.x), width - 1)] for click in clicks if click.positive
        ]
        return mask if mask.any() and all(meant) and (meant or box is not None) else None

    def follow(self, frames: Sequence[np.ndarray], mask: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the mask of every frame but the first, (H, W) uint8, from that of the first frame.

        SAM 2 follows what is above half and gives 0 or 255; without it the mask moves with the pictures, by optical flow.
        """
        with self.lock:
            if self.sam2 is None:
                yield from follow_by_flow(frames, mask)
                return
            for masks in list(self.sam2.follow(frames, [mask > 127]))[1:]:
                yield masks[0].astype(np.uint8) * np.uint8(255)


def grab_cut_clicks(
    picture: np.ndarray, clicks: Sequence[Click], box: tuple[float, float, float, float] | None, current: np.ndarray
) -> np.ndarray:
    """Cuts out by colours what positive clicks show, without what negative ones do. Arguments as for `Selector.select`."""
    import cv2

    height, width = picture.shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
    labels = _begin(cv2.resize(current, size, interpolation=cv2.INTER_AREA), clicks, box, scale)
    radius = max(2, round(CLICK * min(size)))
    for click in clicks:
        place = (round(click.x * scale), round(click.y * scale))
        kind = cv2.GC_FGD if click.positive else cv2.GC_BGD
        cv2.circle(labels, place, radius, kind, cv2.FILLED)
    found = _without_denied(grab_cut(small, labels, ROUNDS), clicks, scale).astype(np.float32)
    return ((cv2.resize(found, (width, height), interpolation=cv2.INTER_LINEAR) > 0.5) * 255).astype(np.uint8)


def _without_denied(found: np.ndarray, clicks: Sequence[Click], scale: float) -> np.ndarray:
    """Takes away the parts that only negative clicks lie in: colours alone do not tell two things of one colour apart."""
    import cv2

    _, parts = cv2.connectedComponents(found)

    def parts_at(positive: bool) -> set[int]:
        places = [(click.y * scale, click.x * scale) for click in clicks if click.positive == positive]
        rows, columns = parts.shape
        return {int(parts[min(int(y), rows - 1), min(int(x), columns - 1)]) for y, x in places}

    denied = parts_at(False) - parts_at(True) - {0}
    return np.where(np.isin(parts, list(denied)), 0, found)


def _begin(current: np.ndarray, clicks: Sequence[Click], box: Any, scale: float) -> np.ndarray:
    """What GrabCut is told before the clicks: the mask so far and its neighbourhood, else the box, else what is near."""
    import cv2

    # Without box and mask nothing is certain but the clicks.
    far = cv2.GC_PR_BGD if box is None and current.max() <= 127 else cv2.GC_BGD
    labels = np.full(current.shape, far, np.uint8)
    reach = max(2, round(REACH * min(current.shape)))
    if box is not None:
        left, top, right, bottom = (round(edge * scale) for edge in box)
        labels[max(top, 0) : bottom, max(left, 0) : right] = cv2.GC_PR_FGD
    elif current.max() > 127:
        inside = (current > 127).astype(np.uint8)
        near = cv2.dilate(inside, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2))
        labels[near > 0] = cv2.GC_PR_BGD
        labels[inside > 0] = cv2.GC_PR_FGD
    for click in clicks if box is None else ():
        if click.positive:
            cv2.circle(labels, (round(click.x * scale), round(click.y * scale)), reach, cv2.GC_PR_FGD, cv2.FILLED)
    return labels


def follow_by_flow(frames: Sequence[np.ndarray], mask: np.ndarray) -> Iterator[np.ndarray]:
    """Yields a mask moved from frame to frame by dense optical flow (DIS), grey values kept. See `Selector.follow`."""
    import cv2

    height, width = mask.shape
    scale = min(1.0, SIDE / max(height, width))
    size = (max(16, round(width * scale)), max(16, round(height * scale)))
    grey = [cv2.cvtColor(cv2.resize(one, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY) for one in frames]
    flow_of: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    for before, after in itertools.pairwise(grey):
        # From the later frame to the earlier one: where each of its pixels was.
        flow = cv2.resize(flow_of.calc(after, before, None), (width, height), interpolation=cv2.INTER_LINEAR)
        flow *= np.array([width / size[0], height / size[1]], np.float32)
        mask = cv2.remap(mask, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        yield mask
