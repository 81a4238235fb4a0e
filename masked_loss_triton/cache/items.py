"""The latent caches of a dataset, each with the picture or clip it was made from."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

from masked_loss_triton.cache.dataset import Dataset, refuse_slips
from masked_loss_triton.cache.families import FAMILIES, Family, family_of
from masked_loss_triton.cache.safetensors_file import TensorFile
from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.frames import IMAGE_EXTENSIONS, MASK_EXTENSIONS, UNREAD_EXTENSIONS, VIDEO_EXTENSIONS

CACHE_NAME = re.compile(r"(?P<stem>.+)_(?P<width>\d{4,})x(?P<height>\d{4,})_(?P<suffix>[^_]+)\.safetensors", re.DOTALL)
CLIP_NAME = re.compile(r"(?P<stem>.+)_(?P<start>\d{5,})-(?P<count>\d{3,})(?:-(?P<section>\d{4,}))?", re.DOTALL)
LATENT_KEY = re.compile(r"latents_(?:(?P<frames>\d+)x)?(?P<height>\d+)x(?P<width>\d+)_[a-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class Source:
    """A picture or clip of a dataset: the files of its targets (more than one for layered models) and its own mask file."""

    stem: str
    targets: tuple[Path, ...]
    mask: Path | None = None


@dataclasses.dataclass(frozen=True)
class CacheItem:
    """One latent cache.

    Attributes:
        path: the cache file.
        stem: of the picture or clip, without the window of frames.
        size: (width, height) of the picture, or of the clip's bucket, pixels.
        window: (first frame, number of frames) of a clip at the trainer's frame rate, or None for a picture.
        source: the picture or clip, or None when the dataset has none of this stem.
        section: number of the part of the window that is cached here, where the family cuts windows into sections.
    """

    path: Path
    stem: str
    size: tuple[int, int]
    window: tuple[int, int] | None
    source: Source | None
    section: int | None = None


@dataclasses.dataclass(frozen=True)
class LatentShape:
    """The latents of a cache: F time steps or layers, h x w cells, and the side of a cell in pixels of the bucket."""

    frames: int
    height: int
    width: int
    cell: int

    @property
    def bucket(self) -> tuple[int, int]:
        """(width, height) of the bucket, pixels."""
        return self.width * self.cell, self.height * self.cell


def find_sources(dataset: Dataset) -> dict[str, Source]:
    """The pictures or clips of a dataset by stem, as the trainer would list them.

    Raises:
        UserError: naming the folder or line that cannot be read.
    """
    if dataset.jsonl is not None and dataset.directory is None:
        return _from_jsonl(dataset)
    assert dataset.directory is not None
    try:
        with os.scandir(dataset.directory) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    except OSError as error:
        kind = "video_directory" if dataset.is_video else "image_directory"
        raise UserError(f"{kind} {dataset.directory} cannot be read ({error.strerror}): correct it", 2) from error
    extensions = VIDEO_EXTENSIONS if dataset.is_video else IMAGE_EXTENSIONS
    files = {name: os.path.splitext(name)[0] for name in names if os.path.splitext(name)[1].lower() in extensions}
    captioned = set(files.values())
    if dataset.caption_extension and not dataset.is_video:
        end = dataset.caption_extension
        captioned = {name[: -len(end)] for name in names if name.endswith(end)}
    sources: dict[str, Source] = {}
    for name, stem in files.items():
        if stem in captioned:
            sources.setdefault(stem, Source(stem, (dataset.directory / name,)))
    if dataset.multiple_target:
        _add_layers(dataset.directory, files, sources)
    return sources


def unread_files(dataset: Dataset) -> list[Path]:
    """Pictures and videos in the folder of a dataset of formats that the trainer passes over, sorted by name."""
    if dataset.directory is None or dataset.jsonl is not None:
        return []
    passed = UNREAD_EXTENSIONS if dataset.is_video else {*UNREAD_EXTENSIONS, *MASK_EXTENSIONS} - {*IMAGE_EXTENSIONS}
    with os.scandir(dataset.directory) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    return [dataset.directory / name for name in names if os.path.splitext(name)[1].lower() in passed]


def _add_layers(folder: Path, files: dict[str, str], sources: dict[str, Source]) -> None:
    """Pictures named like another with _<number> at the end are its further targets, in the order of their numbers."""
    layers: dict[str, list[tuple[int, Path]]] = {}
    for name, stem in files.items():
        base, _, number = stem.rpartition("_")
        if stem not in sources and base in sources and number.isdecimal():
            layers.setdefault(base, []).append((int(number), folder / name))
    for base, found in layers.items():
        targets = sources[base].targets + tuple(path for _, path in sorted(found))
        sources[base] = dataclasses.replace(sources[base], targets=targets)


def _from_jsonl(dataset: Dataset) -> dict[str, Source]:
    sources = {}
    try:
        with open(dataset.jsonl, encoding="utf-8-sig") as lines:  # type: ignore[arg-type]
            for number, line in enumerate(lines, 1):
                if line.strip():
                    source = _from_line(f"{dataset.jsonl}, line {number}", line, dataset)
                    sources[source.stem] = source
    except OSError as error:
        raise UserError(f"{dataset.jsonl} cannot be read ({error.strerror}): correct the path", 2) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{dataset.jsonl} is not UTF-8 text: save it as UTF-8", 2) from error
    return sources


def _from_line(where: str, line: str, dataset: Dataset) -> Source:
    """The picture or clip of one line of a JSON lines file."""
    key = "video_path" if dataset.is_video else "image_path"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: no valid JSON ({error.msg}, column {error.colno})", 2) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a list of thousands of lists
        raise UserError(f"{where}: no valid JSON", 2) from error
    if not isinstance(entry, dict):
        raise UserError(f'{where}: must be an object, {{"{key}": ...}}', 2)
    refuse_slips(where, entry, ("mask_path",))

    def path(name: str) -> Path:
        value = entry.get(name)
        try:
            if not isinstance(value, str) or not value or b"\0" in os.fsencode(value):
                raise ValueError
        except ValueError as error:  # also half of a surrogate pair
            raise UserError(f"{where}: {name} must be a path, got {value!r}", 2) from error
        return Path(value)

    targets = [path(key if key in entry or f"{key}_0" not in entry else f"{key}_0")]
    while dataset.multiple_target and f"{key}_{len(targets)}" in entry:
        targets.append(path(f"{key}_{len(targets)}"))
    stem = os.path.splitext(targets[0].name)[0]
    return Source(stem, tuple(targets), path("mask_path") if entry.get("mask_path") else None)


def find_caches(dataset: Dataset, family: Family, sources: dict[str, Source]) -> list[CacheItem]:
    """The latent caches of a dataset, sorted by name. A folder that does not exist yet has none."""
    try:
        with os.scandir(dataset.cache_directory) as entries:
            names = sorted(entry.name for entry in entries)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cache_directory {dataset.cache_directory} cannot be read ({error.strerror})", 2) from error
    paths = (dataset.cache_directory / name for name in names)
    return [item for path in paths if (item := parse_cache(path, dataset, family, sources)) is not None]


def families_in(dataset: Dataset) -> Counter[str]:
    """Counts the latent caches in the folder of a dataset by the short name that ends them."""
    try:
        with os.scandir(dataset.cache_directory) as entries:
            matches = [CACHE_NAME.fullmatch(entry.name) for entry in entries]
    except OSError:
        return Counter()
    return Counter(match["suffix"] for match in matches if match)


def choose_family(datasets: list[Dataset], given: str | None) -> str:
    """Returns the name of the model family: the one that was given, else the one whose caches there are.

    Raises:
        UserError: where there are none or those of several, with exit status 2.
    """
    found = {family_of(suffix) for dataset in datasets for suffix in families_in(dataset)} - {None}
    if given is None and len(found) != 1:
        seen = f"caches of {', '.join(sorted(filter(None, found)))}" if found else "no latent caches to see it from"
        raise UserError(f"there are {seen}: name the model family, --arch {'|'.join(FAMILIES)}", 2)
    return given or next(filter(None, found))


def no_caches(datasets: list[Dataset], family: str) -> UserError:
    """Returns the error for folders without caches of a family; it names the families whose caches are there instead."""
    folders = ", ".join(str(dataset.cache_directory) for dataset in datasets)
    there = sum((families_in(dataset) for dataset in datasets), Counter())
    others = [
        f"{count} of {family_of(suffix) or f'a family that is not known here ({suffix})'}"
        for suffix, count in there.items()
    ]
    also = f", but {', '.join(others)}: give the family of these caches with --arch, or" if others else ":"
    return UserError(f"no {family} latent caches in {folders}{also} run the trainer's caching script first")


def parse_cache(path: Path, dataset: Dataset, family: Family, sources: dict[str, Source]) -> CacheItem | None:
    """The item of a file name, or None where it is no latent cache of this family and kind of dataset."""
    match = CACHE_NAME.fullmatch(path.name)
    if not match or match["suffix"] not in family.suffixes:
        return None
    stem, window, section = match["stem"], None, None
    if dataset.is_video:
        clip = CLIP_NAME.fullmatch(stem)
        if not clip or (clip["section"] is not None) != family.sections:
            return None
        stem, window = clip["stem"], (int(clip["start"]), int(clip["count"]))
        section = int(clip["section"]) if family.sections else None
    return CacheItem(path, stem, (int(match["width"]), int(match["height"])), window, sources.get(stem), section)


def cells_of(file: TensorFile, family: Family) -> tuple[int, int, int]:
    """(F, h, w) of the latents in a cache: time steps or layers, and cells.

    Raises:
        UserError: naming the cache, when it holds no latents, or others than their name says.
    """
    matches = [match for name in file.tensors if (match := LATENT_KEY.fullmatch(name))]
    if len(matches) != 1:
        raise UserError(f"{file.path} has no latents in it: delete it and run the caching script again")
    named = {"F": int(matches[0]["frames"] or 1), "H": int(matches[0]["height"]), "W": int(matches[0]["width"])}
    shape = file.tensors[matches[0][0]]["shape"]
    wanted = [named.get(axis) for axis in family.latent_axes]
    if len(shape) != len(wanted) or any(size not in (None, got) for size, got in zip(wanted, shape, strict=True)):
        raise UserError(f"{file.path}: the shape of its latents is not the one in their name: cache it again")
    return named["F"], named["H"], named["W"]


def latent_shape(file: TensorFile, item: CacheItem, dataset: Dataset, family: Family) -> LatentShape:
    """The shape of the cached latents; the side of a cell is the bucket's side divided by the latents'.

    Raises:
        UserError: naming the cache, when it holds no latents or latents of another bucket than the dataset asks for.
    """
    frames, height, width = cells_of(file, family)
    if 0 in item.size:
        raise UserError(f"{file.path}: a picture of {item.size[0]}x{item.size[1]} pixels, as its name says: delete it")
    bucket = bucket_size(item.size, dataset, family)
    cell = bucket[0] // width if width else 0
    if not cell or (width * cell, height * cell) != bucket:
        raise UserError(
            f"{file.path} has latents of {width}x{height} cells, but the dataset file asks for a picture of "
            f"{bucket[0]}x{bucket[1]} pixels: run the caching script again with this dataset file"
        )
    return LatentShape(frames, height, width, cell)


def bucket_size(size: tuple[int, int], dataset: Dataset, family: Family) -> tuple[int, int]:
    """(width, height) of the bucket that the trainer gives a picture of this size.

    Source: musubi-tuner 0.3.4, dataset/bucket.py.
    """
    width, height = dataset.resolution
    step = family.bucket_step
    if not dataset.enable_bucket:
        return width, height
    if dataset.bucket_no_upscale and size[0] * size[1] <= width * height:
        return size[0] // step * step, size[1] // step * step
    buckets = buckets_of(dataset.resolution, step)
    aspect = size[0] / size[1]
    return min(buckets, key=lambda bucket: (abs(bucket[0] / bucket[1] - aspect), bucket))


@functools.cache
def buckets_of(resolution: tuple[int, int], step: int) -> list[tuple[int, int]]:
    """Returns the (width, height) of the buckets that the trainer has for a resolution, in order."""
    area = resolution[0] * resolution[1]
    side = int(math.sqrt(area))
    buckets = set()
    for width in range(max(side // 2 // step * step, step), side + step, step):
        height = area // width // step * step
        buckets |= {(width, height), (height, width)}
    return sorted(bucket for bucket in buckets if min(bucket) > 0)
