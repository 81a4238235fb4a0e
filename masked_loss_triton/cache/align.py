"""The weights of one latent cache: from the mask of its picture or clip to an array in the shape of the latents."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.cache.clip_masks import grouped, kept_masks, length_differs
from masked_loss_triton.cache.dataset import Dataset
from masked_loss_triton.cache.families import Family
from masked_loss_triton.cache.items import CacheItem, LatentShape
from masked_loss_triton.cache.safetensors_file import TensorFile
from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.frames import (
    frame_files,
    has_alpha_frames,
    mask_frame_files,
)
from masked_loss_triton.masks.geometry import resize_to_bucket, to_latent
from masked_loss_triton.masks.operations import MaskOperations
from masked_loss_triton.masks.reading import check_is_file, has_alpha, open_image, unreadable
from masked_loss_triton.masks.sources import (
    Candidate,
    MaskDirectory,
    align_to_picture,
    read_still,
)

# Raised when the same inputs give other weights, so that caches of the older version are masked anew.
WEIGHTS_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that decides the weights of a cache, so that a change of it can be seen.

    Attributes:
        candidates: for each target picture, the places where its mask may be.
        labels: for each target picture, the mask of each label, None where it has none.
        contents: for each target picture, kind and SHA-256 of each candidate and label.
        operations: what is done to the mask.
        facts: shape of the latents, size of the picture, window of frames, frame rates, target frame.
        stem: name of the picture or clip.
    """

    candidates: tuple[tuple[Candidate, ...], ...]
    labels: tuple[tuple[Candidate | None, ...], ...]
    contents: list[list[tuple[str, str]]]
    operations: MaskOperations
    facts: tuple[Any, ...]
    stem: str

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, hexadecimal."""
        return self.digest_with(self.operations)

    def digest_with(self, operations: MaskOperations) -> str:
        """Returns the digest that other operations would have given."""
        shape, size, window, fps, target = self.facts
        name = self.stem if operations.mask_blur_random else None
        facts = [WEIGHTS_VERSION, self.contents, dataclasses.asdict(operations), shape, size, window, fps, name, target]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Weights:
    """(1, F, h, w) float32, contiguous; `source` is where each target's came from, `file` the mask's file name, `note` what
    the user should know although it is no error, `labels` the share of each label, in the shape of the values."""

    values: np.ndarray
    source: str
    file: str
    note: str = ""
    labels: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def find_inputs(
    item: CacheItem, shape: LatentShape, dataset: Dataset, family: Family, masks: MaskDirectory | None
) -> Inputs:
    """Looks up the possible masks of an item and hashes their contents; decodes none.

    Raises:
        UserError: naming the file that cannot be read.
    """
    targets: tuple[Path | None, ...] = item.source.targets if item.source is not None else (None,)
    candidates = tuple(_candidates(item, target, dataset, masks) for target in targets)
    fps = (dataset.source_fps, family.fps) if dataset.source_fps is not None and item.window else None
    contents = [
        [(one.kind, _digest(one, target)) for one in group] for group, target in zip(candidates, targets, strict=True)
    ]
    labels = tuple(label_candidates(item, target, dataset, masks) for target in targets)
    if dataset.mask_labels:
        for found, named, target in zip(contents, labels, targets, strict=True):
            found += [
                (name, _digest(one, target) if one else "")
                for name, one in zip(dataset.mask_labels, named, strict=True)
            ]
    window = item.window if item.window is None or item.section is None else (*item.window, item.section)
    facts = (dataclasses.astuple(shape), item.size, window, fps, dataset.one_frame_target)
    return Inputs(candidates, labels, contents, dataset.operations, facts, item.stem)


def _candidates(
    item: CacheItem, target: Path | None, dataset: Dataset, masks: MaskDirectory | None
) -> tuple[Candidate, ...]:
    found = []
    if dataset.alpha_mask and target is not None and target.exists() and _may_have_alpha(item, target):
        found.append(Candidate("alpha", target))
    explicit = item.source.mask if item.source is not None else None
    if explicit is not None:
        found.append(Candidate("file", explicit))
    elif masks is not None:
        stem = item.stem if target is None else target.stem
        path = masks.find(stem, item.window is not None) or masks.find(item.stem, item.window is not None)
        if path is not None:
            found.append(Candidate("file", path))
    if dataset.default_mask is not None:
        found.append(Candidate("default", dataset.default_mask))
    return tuple(found)


def label_candidates(
    item: CacheItem, target: Path | None, dataset: Dataset, masks: MaskDirectory | None
) -> tuple[Candidate | None, ...]:
    """The mask file of each label of a dataset, NAME.LABEL.png and the like, None where there is none."""
    stem, video = item.stem if target is None else target.stem, item.window is not None
    paths = [masks.find(f"{stem}.{label}", video) if masks is not None else None for label in dataset.mask_labels]
    return tuple(Candidate("file", path) if path is not None else None for path in paths)


def _may_have_alpha(item: CacheItem, target: Path) -> bool:
    if item.window is not None:
        return has_alpha_frames(target)
    with open_image(target) as image:
        return has_alpha(image)


def _digest(candidate: Candidate, clip: Path | None) -> str:
    digest, path = hashlib.sha256(), candidate.path
    try:
        files, folder = [path], path.is_dir()
        if folder:
            files = frame_files(path) if candidate.kind == "alpha" else mask_frame_files(path, clip)
        for file in files:
            check_is_file(file)
            with open(file, "rb") as data:
                while block := data.read(1 << 20):
                    digest.update(block)
            if folder:
                digest.update(file.name.encode("utf-8", "surrogateescape") + b"\0")
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def compute_weights(item: CacheItem, file: TensorFile, shape: LatentShape, inputs: Inputs, dataset: Dataset) -> Weights:
    """The weights of a picture's cache.

    One plane for a still; one for each layer of a layered model; for a one-frame cache the mask at the target's place and
    1 at the control frames, as the trainer weights them without a mask.

    Raises:
        UserError: naming the file that is broken, does not fit, or is missing although it is required.
    """
    if dataset.mask_labels:
        from masked_loss_triton.cache.labelled import labelled_weights

        return labelled_weights(item, file, shape, inputs, dataset)
    planes, used = [], []
    for index, candidates in enumerate(inputs.candidates):
        mask, chosen = read_still(list(candidates))
        used.append(chosen)
        if mask is None:
            check_not_required(item, dataset)
            planes.append(np.ones((shape.height, shape.width), np.float32))
            continue
        assert chosen is not None
        target = item.source.targets[index] if item.source is not None else None
        mask = aligned_still(mask, chosen, item, index, target)
        planes.append(dataset.operations.bake(to_cells(mask, item, shape, dataset)))
    values = place(np.stack(planes), item, file, shape, dataset)
    return _weights(values, used)


def aligned_still(mask: np.ndarray, chosen: Candidate, item: CacheItem, index: int, target: Path | None) -> np.ndarray:
    """Brings the mask of an item's target number `index` to the stored pixels of its picture.

    Raises:
        UserError: when it does not fit.
    """
    if chosen.kind == "alpha" and index == 0 and mask.shape != item.size[::-1]:
        raise UserError(
            f"{chosen.path} is {mask.shape[1]}x{mask.shape[0]} but was {item.size[0]}x{item.size[1]} when {item.path} "
            "was cached: run the caching script again"
        )
    size = (mask.shape[1], mask.shape[0]) if index else item.size
    return align_to_picture(mask, size, chosen.path, target, shared=chosen.kind == "default")


def compute_clip_weights(
    items: list[CacheItem], shapes: list[LatentShape], inputs: Inputs, dataset: Dataset, family: Family
) -> list[Weights]:
    """The weights of all windows of one clip; its mask is decoded once. All shapes have the same height and width.

    Raises:
        UserError: as `compute_weights`, and when the mask has fewer frames than the clip.
    """
    if dataset.mask_labels:
        from masked_loss_triton.cache.labelled import labelled_clip_weights

        return labelled_clip_weights(items, shapes, inputs, dataset, family)
    first, shape, candidates = items[0], shapes[0], inputs.candidates[0]
    needed = max(item.window[0] + item.window[1] for item in items if item.window)
    clip = first.source.targets[0] if first.source is not None else None
    for chosen in candidates:
        planes = _clip_planes(chosen, clip, first, shape, needed, dataset, family)
        if planes is None:
            continue
        if 1 < len(planes) < needed:
            raise UserError(
                f"{chosen.path} has only {len(planes)} frames of the {needed} that {clip or first.stem} needs at the "
                "trainer's frame rate: make a mask for every frame, or one still"
            )
        windows = [_window(planes, item, shape, chosen, dataset) for item, shape in zip(items, shapes, strict=True)]
        if len(planes) > 1:  # one mask serves all windows of a clip: it is told of once
            windows[0] = dataclasses.replace(windows[0], note=length_differs(chosen.path, clip))
        return windows
    check_not_required(first, dataset)
    ones = [np.ones((shape.frames, shape.height, shape.width), np.float32) for shape in shapes]
    return [_weights(values, [None]) for values in ones]


def _window(planes: np.ndarray, item: CacheItem, shape: LatentShape, chosen: Candidate, dataset: Dataset) -> Weights:
    return _weights(dataset.operations.bake(grouped(planes, item, shape, dataset)), [chosen])


def _clip_planes(
    chosen: Candidate,
    clip: Path | None,
    item: CacheItem,
    shape: LatentShape,
    needed: int,
    dataset: Dataset,
    family: Family,
) -> np.ndarray | None:
    """Returns (T, h, w) float32 for the first `needed` frames that the trainer keeps, T = 1 for a still; None for an alpha
    channel that hides nothing."""
    planes, lowest = [], 255
    for mask in kept_masks(chosen, clip, dataset, family):
        lowest = min(lowest, int(mask.min()))
        planes.append(to_cells(mask, item, shape, dataset))
        if len(planes) == needed:
            break
    if chosen.kind == "alpha" and lowest == 255:
        return None
    return np.stack(planes)


def to_cells(mask: np.ndarray, item: CacheItem, shape: LatentShape, dataset: Dataset) -> np.ndarray:
    """Brings a mask, (H, W) uint8 in the size of its picture, to the cells of the latents: (h, w) float32 in [0, 1]."""
    edited = dataset.operations.apply(mask, item.stem)
    return to_latent(resize_to_bucket(edited, shape.bucket), (shape.height, shape.width))


def place(
    planes: np.ndarray, item: CacheItem, file: TensorFile, shape: LatentShape, dataset: Dataset, control: float = 1.0
) -> np.ndarray:
    """Brings (targets, h, w) to the (F, h, w) of a picture's cache: its layers, or the target among its frames, the others of
    which get `control`.

    Raises:
        UserError: naming the cache, when the dataset has another number of pictures or another target for it.
    """
    if len(planes) == shape.frames:
        return planes
    if "f_indices_int32" in file.tensors and len(planes) == 1:
        indices = file.read("f_indices_int32").tolist()
        if dataset.one_frame_target not in indices:
            raise UserError(
                f"{item.path} is a one-frame cache for the frames {indices}, and fp_1f_target_index is "
                f"{dataset.one_frame_target}: use the dataset file it was cached with"
            )
        values = np.full((shape.frames, *planes.shape[1:]), control, np.float32)
        values[sorted(indices).index(dataset.one_frame_target)] = planes[0]
        return values
    raise UserError(
        f"{item.path} has {shape.frames} layers or frames, and its dataset has {len(planes)} pictures for it: set "
        "multiple_target, or run the caching script again"
    )


def check_not_required(item: CacheItem, dataset: Dataset) -> None:
    """Refuses an item without mask where the dataset requires one.

    Raises:
        UserError: naming the picture.
    """
    if dataset.require_mask:
        picture = item.source.targets[0] if item.source is not None else item.path
        raise UserError(f"{picture} has no mask, and require_mask is set: add one, or a default_mask")


def _weights(values: np.ndarray, used: list[Candidate | None]) -> Weights:
    kinds = [one.kind if one is not None else "full" for one in used]
    source = kinds[0] if len(set(kinds)) == 1 else ",".join(kinds)
    return Weights(
        np.ascontiguousarray(values[None], np.float32),
        source,
        ",".join(one.path.name for one in used if one is not None),
    )
