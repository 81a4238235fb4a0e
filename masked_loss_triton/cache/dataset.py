"""The trainer's dataset file (TOML or JSON), with our mask keys in it or in a second file of the same shape."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masked_loss_triton.errors import UserError, install_command
from masked_loss_triton.masks.labels import parse_labels
from masked_loss_triton.masks.operations import MaskOperations

# Our keys: allowed in [general], in each [[datasets]] and, with two dashes, on the command line.
SOURCE_KEYS = ("alpha_mask", "mask_directory", "mask_labels", "default_mask", "require_mask")
OPERATION_KEYS = tuple(field.name for field in dataclasses.fields(MaskOperations))
KINDS: dict[str, tuple[type, ...]] = {
    "true or false": (bool,),
    "text": (str,),
    "a whole number": (int,),
    "a number": (int, float),
}
UNBAKED: dict[str, Any] = {"mask_bake_invert": False, "mask_bake_gamma": 1.0, "mask_bake_min_weight": 0.0}
MASK_KEYS = (*SOURCE_KEYS, *OPERATION_KEYS)
# Keys about masks that forks of the trainer know and this program does not read: no slips of the pen.
FOREIGN_KEYS = ("watermark_mask_suffix", "loss_mask_directory", "default_loss_mask_path", "loss_mask_path")
# Bounds of what the trainer can use; beyond them its own arithmetic does not end.
SIDES, RATES = (16, 16384), (0.01, 1000.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One [[datasets]] entry, with [general] and the command line merged in.

    Paths are relative to the working directory, as the trainer takes them.
    """

    index: int
    is_video: bool
    directory: Path | None
    jsonl: Path | None
    cache_directory: Path
    caption_extension: str | None
    resolution: tuple[int, int]
    enable_bucket: bool
    bucket_no_upscale: bool
    multiple_target: bool
    source_fps: float | None
    one_frame_target: int | None
    alpha_mask: bool
    mask_directory: Path | None
    mask_labels: tuple[str, ...]
    default_mask: Path | None
    require_mask: bool
    operations: MaskOperations

    @property
    def name(self) -> str:
        """The name of the dataset in messages: its number and its folder or list."""
        return f"dataset {self.index} ({self.directory or self.jsonl})"

    @property
    def has_mask_source(self) -> bool:
        """Whether it says where masks are; a JSON lines file may name them line by line."""
        return self.alpha_mask or bool(self.mask_directory or self.default_mask or self.jsonl)


def plain_dataset(images: Path, masks: Path, resolution: tuple[int, int], video: bool) -> Dataset:
    """Returns the dataset of a folder of pictures, or of clips, without a dataset file: buckets, no operations.

    Raises:
        UserError: for a resolution that no trainer takes, with exit status 2.
    """
    folder = "video_directory" if video else "image_directory"
    table = {folder: str(images), "mask_directory": str(masks), "resolution": list(resolution), "enable_bucket": True}
    return _dataset(0, images, (table,))


def load_datasets(
    path: str | os.PathLike[str],
    mask_config: str | os.PathLike[str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> list[Dataset]:
    """Reads the datasets of a trainer's dataset file.

    Mask keys are looked up in this order: `flags`, the dataset's entry in the second file, its entry in the first, the
    second file's [general], the first's.

    Args:
        path: the trainer's dataset file, .toml or .json.
        mask_config: a second file of the same shape that holds only mask keys, its [[datasets]] in the same order:
            the trainer refuses keys that it does not know.
        flags: mask keys from the command line; None values are not given.

    Raises:
        UserError: naming the file, the dataset and the key, with exit status 2.
    """
    config = _load(Path(path))
    extra = _load(Path(mask_config)) if mask_config is not None else {}
    entries, extra_entries = _entries(path, config), _entries(mask_config, extra) if extra.get("datasets") else []
    if not entries:
        raise UserError(f"{path} has no [[datasets]]: add one", 2)
    if extra_entries and len(extra_entries) != len(entries):
        raise UserError(
            f"{mask_config} has {len(extra_entries)} [[datasets]] and {path} has {len(entries)}: give one for each, in "
            "the same order (an empty one where nothing is to be said)",
            2,
        )
    for table in (extra.get("general", {}), *extra_entries):
        for key in sorted(set(table) - set(MASK_KEYS)):
            raise UserError(f"{mask_config}: unknown key {key!r}{_meant(key)}", 2)
    for table in (config.get("general", {}), *entries):
        refuse_slips(str(path), table, MASK_KEYS)
    for file, table in ((path, config), (mask_config, extra)):
        for key in (key for key in table if key in MASK_KEYS or _resembles(key, MASK_KEYS)):
            raise UserError(f"{file}: {key!r} stands outside [general] and [[datasets]]: move it into one of them", 2)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    general = (extra.get("general", {}), config.get("general", {}))
    own = extra_entries or [{} for _ in entries]
    datasets = [_dataset(i, path, (given, own[i], entry, *general)) for i, entry in enumerate(entries)]
    folders = [os.path.realpath(dataset.cache_directory) for dataset in datasets]
    if len(set(folders)) < len(folders):
        raise UserError(f"{path}: two datasets share a cache_directory; give each its own", 2)
    return datasets


def refuse_slips(where: str, table: Mapping[str, Any], ours: tuple[str, ...]) -> None:
    """Refuses keys that are meant for this program and are none of its own; the trainer's keys pass.

    Args:
        where: the file, and the line of it.
        table: one table of the file, or one line of a JSON lines file.
        ours: the keys of this program that may stand there.

    Raises:
        UserError: naming the place, the key and the one that was meant, with exit status 2.
    """
    for key in table:
        if key not in (*ours, *FOREIGN_KEYS) and _resembles(key, ours):
            raise UserError(f"{where}: unknown key {key!r}{_meant(key, ours)}", 2)


def _resembles(key: str, ours: tuple[str, ...]) -> list[str]:
    """The keys of ours that look like this one; all of them for any other key about masks."""
    plain = key.lower().replace("-", "_")
    near = difflib.get_close_matches(plain, ours, 1, 0.85)
    return near or (list(ours) if "mask" in plain else [])


def _meant(key: str, ours: tuple[str, ...] = MASK_KEYS) -> str:
    near = _resembles(key, ours)
    return f": did you mean {near[0]!r}?" if len(near) == 1 else f"; known are {', '.join(ours)}"


def without_mask_keys(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the contents of a dataset file without the keys about masks, which the trainer would refuse."""
    config = _load(Path(path))

    def strip(table: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in table.items() if key not in MASK_KEYS}

    result = {**config, "datasets": [strip(entry) for entry in _entries(path, config)]}
    if "general" in config:
        result["general"] = strip(config["general"])
    return result


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{path} cannot be read ({reason}): give the trainer's dataset file", 2) from error
    try:
        if path.suffix.lower() == ".json":
            config = json.loads(text)
        elif path.suffix.lower() == ".toml":
            config = _toml().loads(text)
        else:
            raise UserError(f"{path} must be a .toml or .json file", 2)
    except ValueError as error:  # TOMLDecodeError and JSONDecodeError
        raise UserError(f"{path} is not valid: {error}", 2) from error
    except RecursionError as error:
        raise UserError(f"{path} is not valid: its lists are nested too deep", 2) from error
    if not isinstance(config, dict) or not isinstance(config.get("general", {}), dict):
        raise UserError(f"{path} must hold [general] and [[datasets]]", 2)
    return config


def _toml() -> Any:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        try:
            import tomli as tomllib
        except ModuleNotFoundError as error:
            hint = install_command("cache")
            raise UserError(f"Python 3.10 needs the package tomli to read TOML: {hint}", 2) from error
    return tomllib


def _entries(path: Any, config: dict[str, Any]) -> list[dict[str, Any]]:
    entries = config.get("datasets", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: datasets must be a list of tables, [[datasets]]", 2)
    return entries


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Looks keys of one dataset up in its tables, the most particular first; a wrong value is one line that names `where`."""

    where: str
    tables: tuple[Mapping[str, Any], ...]

    def get(self, key: str, kind: str, default: Any = None) -> Any:
        value = next((table[key] for table in self.tables if table.get(key) is not None), default)
        wrong = isinstance(value, bool) and kind != "true or false"
        if value is not None and (wrong or not isinstance(value, KINDS[kind])):
            raise self.error(f"{key} must be {kind}, got {value!r}")
        return value

    def path(self, key: str) -> Path | None:
        value = self.get(key, "text")
        if value and "\0" in value:
            raise self.error(f"{key} {value!r} is no path")
        return Path(value) if value else None

    def resolution(self) -> tuple[int, int]:
        size = next((table["resolution"] for table in self.tables if "resolution" in table), (960, 544))
        sides = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        low, high = SIDES
        if len(sides) != 2 or not all(type(side) is int and low <= side <= high for side in sides):
            raise self.error(
                f"resolution must be [width, height] or one number, each {low} to {high} pixels, got {str(size)[:60]}"
            )
        return sides[0], sides[1]

    def rate(self) -> float | None:
        rate, (low, high) = self.get("source_fps", "a number"), RATES
        if rate is not None and not low <= rate <= high:  # also not a number
            raise self.error(f"source_fps must be between {low:g} and {high:g} frames per second, got {rate!r}")
        return rate

    def mask_paths(self, directory: Path | None) -> tuple[Path | None, Path | None]:
        """Returns the mask folder and the default mask, either of them None where it was not named."""
        masks, default = self.path("mask_directory"), self.path("default_mask")
        if masks and directory and os.path.realpath(masks) == os.path.realpath(directory):
            raise self.error(f"mask_directory is the folder {directory} itself, so that pictures would be masks")
        if default is not None and not default.is_file():
            raise self.error(f"default_mask {default} is not a file")
        return masks, default

    def labels(self, masks: Path | None) -> tuple[str, ...]:
        value = next((table["mask_labels"] for table in self.tables if table.get("mask_labels") is not None), ())
        try:
            labels = parse_labels(value)
        except ValueError as error:
            raise self.error(f"mask_labels: {error}") from error
        if labels and masks is None:
            raise self.error("mask_labels are looked for in mask_directory, as NAME.LABEL.png: give it")
        return labels

    def operations(self) -> MaskOperations:
        values = {key: next((table[key] for table in self.tables if key in table), None) for key in OPERATION_KEYS}
        try:
            return MaskOperations(**{key: value for key, value in values.items() if value is not None})
        except ValueError as error:
            raise self.error(str(error)) from error

    def error(self, text: str) -> UserError:
        return UserError(f"{self.where}: {text}", 2)


def _dataset(index: int, path: str | os.PathLike[str], tables: tuple[Mapping[str, Any], ...]) -> Dataset:
    read = _Reader(f"{path}, dataset {index}", tables)
    video = bool(read.get("video_directory", "text") or read.get("video_jsonl_file", "text"))
    kind = "video" if video else "image"
    directory, jsonl = read.path(f"{kind}_directory"), read.path(f"{kind}_jsonl_file")
    if directory is None and jsonl is None:
        raise read.error("no image_directory, image_jsonl_file, video_directory or video_jsonl_file")
    cache = read.path("cache_directory") or directory
    if cache is None:
        raise read.error("no cache_directory, which a JSON lines file needs")
    bucket = read.get("enable_bucket", "true or false", False)
    mask_directory, default_mask = read.mask_paths(directory)
    labels, operations = read.labels(mask_directory), read.operations()
    if labels and operations != dataclasses.replace(operations, **UNBAKED):
        raise read.error("mask_labels are weighted at training time, after which mask_bake_* come: leave those out")
    return Dataset(
        index=index,
        is_video=video,
        directory=directory,
        jsonl=jsonl,
        cache_directory=cache,
        caption_extension=read.get("caption_extension", "text"),
        resolution=read.resolution(),
        # Clips always go to buckets, and may be enlarged, whatever the file says.
        enable_bucket=bucket or video,
        bucket_no_upscale=read.get("bucket_no_upscale", "true or false", False) and bucket and not video,
        multiple_target=read.get("multiple_target", "true or false", False),
        source_fps=read.rate(),
        one_frame_target=read.get("fp_1f_target_index", "a whole number"),
        alpha_mask=read.get("alpha_mask", "true or false", False),
        mask_directory=mask_directory,
        mask_labels=labels,
        default_mask=default_mask,
        require_mask=read.get("require_mask", "true or false", False),
        operations=operations,
    )
