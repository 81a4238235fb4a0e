"""The trainer's dataset file (TOML or JSON), with our mask keys in it or in a second file of the same shape."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.operations import MaskOperations

# Our keys: allowed in [general], in each [[datasets]] and, with two dashes, on the command line.
SOURCE_KEYS = ("alpha_mask", "mask_directory", "default_mask", "require_mask")
OPERATION_KEYS = tuple(field.name for field in dataclasses.fields(MaskOperations))
KINDS: dict[str, tuple[type, ...]] = {
    "true or false": (bool,),
    "text": (str,),
    "a whole number": (int,),
    "a number": (int, float),
}
MASK_KEYS = (*SOURCE_KEYS, *OPERATION_KEYS)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What the trainer's names for a model family mean to its caches.

    Attributes:
        suffixes: short names that end the cache files.
        fps: frame rate that clips with `source_fps` are brought to, or None where the trainer takes no clips.
        bucket_step: sides of buckets are multiples of it, pixels.
    """

    suffixes: tuple[str, ...]
    fps: float | None
    bucket_step: int = 16


# Source: musubi-tuner 0.3.4, dataset/architectures.py, image_video_dataset.py, bucket.py.
ARCHITECTURES = {
    "hv": Architecture(("hv",), 24.0),
    "hv15": Architecture(("hv15",), 24.0),
    "wan": Architecture(("wan",), 16.0),
    "qwen": Architecture(("qi", "qie", "qil"), None),
}


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
    default_mask: Path | None
    require_mask: bool
    operations: MaskOperations

    @property
    def name(self) -> str:
        """How reports call it."""
        return f"dataset {self.index} ({self.directory or self.jsonl})"

    @property
    def has_mask_source(self) -> bool:
        """Whether it says where masks are; a JSON lines file may name them line by line."""
        return self.alpha_mask or bool(self.mask_directory or self.default_mask or self.jsonl)


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
    for where, table in ((mask_config, extra.get("general", {})), *((mask_config, entry) for entry in extra_entries)):
        unknown = sorted(set(table) - set(MASK_KEYS))
        if unknown:
            raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(MASK_KEYS)}", 2)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    datasets = []
    for index, entry in enumerate(entries):
        own = extra_entries[index] if extra_entries else {}
        tables = (given, own, entry, extra.get("general", {}), config.get("general", {}))
        datasets.append(_dataset(index, path, tables))
    folders = [os.path.realpath(dataset.cache_directory) for dataset in datasets]
    if len(set(folders)) < len(folders):
        raise UserError(f"{path}: two datasets share a cache_directory; give each its own", 2)
    return datasets


def without_mask_keys(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The trainer's part of a dataset file: what it accepts once our keys are out."""
    config = _load(Path(path))

    def strip(table: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in table.items() if key not in MASK_KEYS}

    result = {**config, "datasets": [strip(entry) for entry in _entries(path, config)]}
    if "general" in config:
        result["general"] = strip(config["general"])
    return result


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
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
            hint = "pip install 'masked_loss_triton[cache]'"
            raise UserError(f"Python 3.10 needs the package tomli to read TOML: {hint}", 2) from error
    return tomllib


def _entries(path: Any, config: dict[str, Any]) -> list[dict[str, Any]]:
    entries = config.get("datasets", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: datasets must be a list of tables, [[datasets]]", 2)
    return entries


def _dataset(index: int, path: str | os.PathLike[str], tables: tuple[Mapping[str, Any], ...]) -> Dataset:
    where = f"{path}, dataset {index}"

    def get(key: str, kind: str, default: Any = None) -> Any:
        value = next((table[key] for table in tables if table.get(key) is not None), default)
        wrong = isinstance(value, bool) and kind != "true or false"
        if value is not None and (wrong or not isinstance(value, KINDS[kind])):
            raise UserError(f"{where}: {key} must be {kind}, got {value!r}", 2)
        return value

    def folder(key: str) -> Path | None:
        value = get(key, "text")
        return Path(value) if value else None

    video = bool(get("video_directory", "text") or get("video_jsonl_file", "text"))
    kind = "video" if video else "image"
    directory, jsonl = folder(f"{kind}_directory"), folder(f"{kind}_jsonl_file")
    if directory is None and jsonl is None:
        raise UserError(f"{where} has no image_directory, image_jsonl_file, video_directory or video_jsonl_file", 2)
    cache = folder("cache_directory") or directory
    if cache is None:
        raise UserError(f"{where} has no cache_directory, which a JSON lines file needs", 2)
    size = next((table["resolution"] for table in tables if "resolution" in table), (960, 544))
    size = [size, size] if isinstance(size, int) else size
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(isinstance(x, int) and x > 0 for x in size):
        raise UserError(f"{where}: resolution must be [width, height] or one number, got {size!r}", 2)
    bucket = get("enable_bucket", "true or false", False)
    mask_directory = folder("mask_directory")
    if mask_directory and directory and os.path.realpath(mask_directory) == os.path.realpath(directory):
        raise UserError(f"{where}: mask_directory is the {kind} folder itself, so that pictures would be masks", 2)
    default_mask = folder("default_mask")
    if default_mask is not None and not default_mask.is_file():
        raise UserError(f"{where}: default_mask {default_mask} is not a file", 2)
    try:
        values = {key: next((table[key] for table in tables if key in table), None) for key in OPERATION_KEYS}
        operations = MaskOperations(**{key: value for key, value in values.items() if value is not None})
    except ValueError as error:
        raise UserError(f"{where}: {error}", 2) from error
    return Dataset(
        index=index,
        is_video=video,
        directory=directory,
        jsonl=jsonl,
        cache_directory=cache,
        caption_extension=get("caption_extension", "text"),
        resolution=(size[0], size[1]),
        # Clips always go to buckets, and may be enlarged, whatever the file says.
        enable_bucket=bucket or video,
        bucket_no_upscale=get("bucket_no_upscale", "true or false", False) and bucket and not video,
        multiple_target=get("multiple_target", "true or false", False),
        source_fps=get("source_fps", "a number"),
        one_frame_target=get("fp_1f_target_index", "a whole number"),
        alpha_mask=get("alpha_mask", "true or false", False),
        mask_directory=mask_directory,
        default_mask=default_mask,
        require_mask=get("require_mask", "true or false", False),
        operations=operations,
    )
