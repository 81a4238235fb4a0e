"""Joins pictures and masks to RGBA pictures, and splits them again: colours keep every byte, also where they are transparent.

for converted in convert_folder(Conversion(images=Path("photos"), masks=Path("masks"), out=Path("rgba"))):
    print(converted.status, converted.file, converted.message)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import NO_FILE, replace_file
from masked_loss_triton.files.captions import CaptionCopy, caption_of, check_extension, copy_of_caption
from masked_loss_triton.files.notes import png_note, read_png_note
from masked_loss_triton.files.parallel import default_workers, run_parallel
from masked_loss_triton.masks.frames import to_uint8
from masked_loss_triton.masks.labels import UNLABELLED, complete_weights, split
from masked_loss_triton.masks.listing import check_three_folders, list_pictures
from masked_loss_triton.masks.reading import has_16_bits, open_image, read_mask_file, read_picture
from masked_loss_triton.masks.sources import MaskDirectory, align_to_picture, mask_directories

NOTE = "to_alpha"
OVERWRITE = "give --force to overwrite it, or another folder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is converted, and where to.

    Args:
        images: the pictures; sub-folders are mirrored.
        masks: their masks, by stem, in the same sub-folders; with `split` they are written here.
        out: where the pictures are written, as PNG.
        split: RGBA pictures to pictures and masks.
        captions: the extension of caption files that are copied, as ".txt"; None copies none.
        force: replace what is already there.
        weights: of labels, whose masks are NAME.LABEL.png and make one alpha channel; the first wins where they overlap.

    Raises:
        UserError: for folders that do not exist, are not three, or cannot be written, and for a bad extension.
    """

    images: Path
    masks: Path
    out: Path
    split: bool = False
    captions: str | None = None
    force: bool = False
    weights: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.images.is_dir():
            raise UserError(f"--images {self.images} is not a folder", 2)
        check_three_folders(self.images, self.masks, self.out)
        if not self.split and not self.masks.is_dir():
            raise UserError(f"--masks {self.masks} is not a folder", 2)
        if self.split and self.weights:
            raise UserError(
                "--mask_weights makes one alpha channel of labels, which --split cannot take apart: drop one", 2
            )
        if self.captions is not None:
            check_extension(self.captions)

    @property
    def may_replace(self) -> tuple[int, ...] | None:
        """What `replace_file` may replace: nothing that is there by now, or anything with `force`."""
        return None if self.force else NO_FILE

    @property
    def written_folders(self) -> tuple[Path, ...]:
        """The folders that files are written to."""
        return (self.out, self.masks) if self.split else (self.out,)


@dataclasses.dataclass(frozen=True)
class Converted:
    """What became of one picture: "written", "present" when it was there already, made of the same files, or "problem"."""

    file: Path
    status: str
    message: str = ""


def convert_folder(conversion: Conversion, files: list[Path] | None = None) -> Iterator[Converted]:
    """Converts pictures in a few threads; yields what became of each, as they are done.

    Args:
        conversion: folders and flags.
        files: of `list_pictures`; None takes all, and also yields those that share a stem.

    Raises:
        UserError: when there are none. What is wrong with a single picture is a `Converted` of it.
    """
    if files is None:
        listing = list_pictures(conversion.images, (conversion.masks, conversion.out))
        files = listing.files
        yield from (Converted(file, "problem", message) for file, message in listing.problems.items())
    directories = {} if conversion.split else mask_directories(files, conversion.images, conversion.masks)
    for label in conversion.weights:
        stems = (stem for directory in directories.values() for stem in directory.stills)
        if label != UNLABELLED and not any(stem.endswith(f".{label}") for stem in stems):
            raise UserError(
                f"--mask_weights: no mask of a label {label!r} in {conversion.masks}, as NAME.{label}.png", 2
            )
    yield from run_parallel(lambda file: _convert(file, conversion, directories), files, default_workers())


def _convert(file: Path, conversion: Conversion, directories: dict[Path, MaskDirectory]) -> Converted:
    try:
        changed = (_split if conversion.split else _join)(file, conversion, directories.get(file.parent))
    except UserError as error:
        return Converted(file, "problem", str(error))
    except OSError as error:
        return Converted(file, "problem", f"{error.filename or file}: {error.strerror or error}")
    return Converted(file, "written" if changed else "present")


def _join(file: Path, conversion: Conversion, directory: MaskDirectory | None) -> bool:
    """Returns whether anything was written."""
    labels = [label for label in conversion.weights if label != UNLABELLED]
    names = [*(f"{file.stem}.{label}" for label in labels), file.stem]
    paths = [directory.find(name, video=False) if directory else None for name in names]
    place = file.parent.relative_to(conversion.images)
    if not any(paths):
        raise UserError(f"{file} has no mask in {conversion.masks / place}: add {file.stem}.png")
    target = conversion.out / place / f"{file.stem}.png"
    digests = {label: _digest(path) for label, path in zip([*labels, "mask"], paths, strict=True) if path}
    made_of = {"picture": _digest(file), **digests}
    if labels:
        made_of["weights"] = " ".join(f"{label}={weight:g}" for label, weight in conversion.weights.items())
    due = _is_due(target, made_of, conversion)
    caption = _caption(file, conversion, target.parent)
    if due:
        picture = _read_8_bits(file)
        size = (picture.rgb.shape[1], picture.rgb.shape[0])
        masks = [
            align_to_picture(to_uint8(read_mask_file(path, exif=False)), size, path, file) if path else None
            for path in paths
        ]
        alpha = _weighted(masks, [*labels, UNLABELLED], conversion.weights)
        _save(target, np.dstack([picture.rgb, alpha]), made_of, file, conversion.may_replace)
    return _copy(caption) or due


def _weighted(masks: list[np.ndarray | None], labels: list[str], weights: dict[str, float]) -> np.ndarray:
    """One (H, W) uint8 mask of those of labels; a plain mask alone is itself."""
    if len(masks) == 1 and masks[0] is not None:
        return masks[0]
    present = [(mask, label) for mask, label in zip(masks, labels, strict=True) if mask is not None]
    factors = complete_weights(weights, {**weights, UNLABELLED: 1.0})  # the same scale for every picture
    total = np.zeros(present[0][0].shape, np.float32)
    parts = split([mask for mask, _ in present], plain=present[-1][1] == UNLABELLED)
    for part, (_, label) in zip(parts, present, strict=True):
        total += part * np.float32(factors[label])
    return np.rint(total).astype(np.uint8)


def _split(file: Path, conversion: Conversion, _: object) -> bool:
    """Returns whether anything was written."""
    place = file.parent.relative_to(conversion.images)
    target, mask_target = (folder / place / f"{file.stem}.png" for folder in (conversion.out, conversion.masks))
    made_of = {"picture": _digest(file)}
    due = [_is_due(path, made_of, conversion) for path in (target, mask_target)]
    caption = _caption(file, conversion, target.parent)
    if any(due):
        picture = _read_8_bits(file)
        if picture.alpha is None:
            raise UserError(f"{file} has no alpha channel: there is nothing to split")
        if due[1]:
            _save(mask_target, to_uint8(picture.alpha), made_of, None, conversion.may_replace)
        if due[0]:
            _save(target, picture.rgb, made_of, file, conversion.may_replace)
    return _copy(caption) or any(due)


def _read_8_bits(file: Path) -> Any:
    with open_image(file) as image:
        if has_16_bits(image):
            raise UserError(f"{file} has 16 bits per channel and would lose half of them: save it with 8 bits first")
    return read_picture(file, exif=False)


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()[:32]
    except OSError as error:
        raise UserError(f"{path} cannot be opened ({error.strerror}): replace or remove it") from error


def _is_due(target: Path, made_of: dict[str, str], conversion: Conversion) -> bool:
    """Whether a picture is to be written; False for one that was made of the same files.

    Raises:
        UserError: for another file of that name.
    """
    if conversion.force or not target.exists():
        return True
    if (read_png_note(target) or {}).get(NOTE) == made_of:
        return False
    raise UserError(f"{target} is already there: {OVERWRITE}")


def _save(
    target: Path, array: np.ndarray, made_of: dict[str, str], original: Path | None, expected: tuple[int, ...] | None
) -> None:
    kept: dict[str, Any] = {}
    if original is not None:
        # Pixels stay as they are stored, so their orientation and colour profile have to go with them.
        with open_image(original) as image:
            kept = {key: image.info[key] for key in ("exif", "icc_profile") if image.info.get(key)}
            if image.mode == "CMYK":
                kept.pop("icc_profile", None)
    note = png_note({NOTE: made_of})
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_file(target, lambda file: Image.fromarray(array).save(file, "PNG", pnginfo=note, **kept), expected=expected)


def _caption(file: Path, conversion: Conversion, folder: Path) -> CaptionCopy | None:
    """The caption to copy; None where it is not wanted, or there already.

    Raises:
        UserError: when it is absent, or another one is in its place: before anything is written.
    """
    if conversion.captions is None:
        return None
    caption = caption_of(file, conversion.captions)
    if not caption.is_file():
        raise UserError(f"{file} has no caption {caption.name}: add it, or leave out --captions")
    return copy_of_caption(caption, folder / caption.name, OVERWRITE, conversion.force)


def _copy(caption: CaptionCopy | None) -> bool:
    if caption is not None:
        caption.run()
    return caption is not None
