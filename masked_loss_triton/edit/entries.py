"""The pictures and clips of a data set, and where the mask of each is and goes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from masked_loss_triton.cache.dataset import Dataset, plain_dataset
from masked_loss_triton.cache.families import Family
from masked_loss_triton.cache.inject import Prepared
from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.jobs import find_jobs
from masked_loss_triton.generate.mask_files import is_mask


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """A picture or clip of the data set.

    Attributes:
        name: its path below the folder, with slashes.
        source: the picture or clip.
        target: where its mask is saved: a PNG, for a clip a folder of PNGs.
        masks: the masks it had when the editor was started, the one that `cache` reads first.
        is_clip: whether it is a clip.
        dataset, family: decide the size of its latents.
        prepared: the dataset with its caches, where there is a dataset file.
        fixed: the mask that a line of the dataset's list names, which alone is read.
    """

    name: str
    source: Path
    target: Path
    masks: tuple[Path, ...]
    is_clip: bool
    dataset: Dataset
    family: Family
    prepared: Prepared | None = None
    fixed: Path | None = None

    @property
    def stem(self) -> str:
        """The name by which `cache` finds its mask."""
        return self.source.stem if not self.source.is_dir() else self.source.name

    def mask(self) -> Path | None:
        """The mask that is there now, or None."""
        return next((path for path in (self.target, *self.masks) if is_mask(path)), None)


def entries_of_folders(
    images: Path, masks: Path, resolution: tuple[int, int], family: Family, label: str = ""
) -> tuple[list[Entry], list[str]]:
    """Lists the pictures and clips below a folder, and a line for each file that cannot have a mask of its own.

    Args:
        images: the pictures and clips; sub-folders are mirrored in `masks`.
        masks: their masks.
        resolution: width and height of the training, pixels.
        family: the model family, which decides the sides of buckets.
        label: of the masks, which are then called NAME.LABEL; "" for plain masks.
    """
    found = find_jobs(images, masks, label=label)
    datasets = [plain_dataset(images, masks, resolution, video) for video in (False, True)]
    entries = []
    for job in found.jobs:
        name = job.source.relative_to(images).as_posix()
        entries.append(Entry(name, job.source, job.target, job.masks, job.is_clip, datasets[job.is_clip], family))
    return entries, found.problems


def mask_folder(dataset: Dataset) -> Path:
    """Returns the folder that the masks of a dataset are in or go to.

    Raises:
        UserError: for a dataset without one: there is nowhere to save to.
    """
    if dataset.mask_directory is None:
        raise UserError(f"{dataset.name} has no mask_directory: give --masks, or the key in the dataset file", 2)
    return dataset.mask_directory


def entries_of_dataset(prepared: Prepared, label: str = "") -> list[Entry]:
    """Lists the pictures and clips of a dataset that has a folder of masks; with a label, with the masks of that label.

    Raises:
        UserError: for a dataset without such a folder: there is nowhere to save to.
    """
    dataset, folder = prepared.dataset, mask_folder(prepared.dataset)
    entries = []
    for source in prepared.sources.values():
        picture, name = source.targets[0], f"{source.stem}.{label}" if label else source.stem
        own = None if label else source.mask
        found = own or (prepared.masks.find(name, dataset.is_video) if prepared.masks else None)
        target = folder / (name if dataset.is_video else f"{name}.png")
        # A mask that a line of a JSON lines file names is written where it stands.
        if own is not None and own.suffix.lower() == ".png" and not dataset.is_video:
            target = own
        masks = (found,) if found is not None else ()
        entries.append(
            Entry(picture.name, picture, target, masks, dataset.is_video, dataset, prepared.family, prepared, own)
        )
    return entries
