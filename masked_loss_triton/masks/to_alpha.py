"""Pictures and masks to RGBA pictures and back: colours keep every byte, also where they are transparent."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import replace_file
from masked_loss_triton.masks.frames import to_uint8
from masked_loss_triton.masks.reading import open_image, read_mask_file, read_picture
from masked_loss_triton.masks.sources import MaskDirectory, align_to_picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conversion:
    """The folders of one run. `directory` None splits RGBA pictures, their masks going to `masks`."""

    masks: Path
    directory: MaskDirectory | None
    out: Path
    captions: str | None
    force: bool


def convert(file: Path, conversion: Conversion) -> str | None:
    """Joins or splits one picture. Returns what is wrong with it, or None."""
    try:
        if conversion.directory is None:
            _split(file, conversion)
        else:
            _join(file, conversion, conversion.directory)
        if conversion.captions:
            _copy_caption(file, conversion)
    except UserError as error:
        return str(error)
    return None


def _join(file: Path, conversion: Conversion, directory: MaskDirectory) -> None:
    mask_path = directory.find(file.stem, video=False)
    if mask_path is None:
        raise UserError(f"{file} has no mask in {directory.path}: add {file.stem}.png")
    target = _free(conversion.out / f"{file.stem}.png", conversion)
    picture = read_picture(file, exif=False)
    mask = to_uint8(read_mask_file(mask_path, exif=False))
    size = (picture.rgb.shape[1], picture.rgb.shape[0])
    alpha = align_to_picture(mask, size, mask_path, file)
    _save(target, np.dstack([picture.rgb, alpha]), file)


def _split(file: Path, conversion: Conversion) -> None:
    picture = read_picture(file, exif=False)
    if picture.alpha is None:
        raise UserError(f"{file} has no alpha channel: there is nothing to split")
    target = _free(conversion.out / f"{file.stem}.png", conversion)
    mask_target = _free(conversion.masks / f"{file.stem}.png", conversion)
    _save(mask_target, to_uint8(picture.alpha), None)
    _save(target, picture.rgb, file)


def _free(target: Path, conversion: Conversion) -> Path:
    if target.exists() and not conversion.force:
        raise UserError(f"{target} is already there: give --force to overwrite it, or another folder")
    return target


def _save(target: Path, array: np.ndarray, original: Path | None) -> None:
    kept: dict[str, Any] = {}
    if original is not None:
        # Pixels stay as they are stored, so their orientation and colour profile have to go with them.
        with open_image(original) as image:
            kept = {key: image.info[key] for key in ("exif", "icc_profile") if image.info.get(key)}
            if image.mode == "CMYK":
                kept.pop("icc_profile", None)
    replace_file(target, lambda file: Image.fromarray(array).save(file, "PNG", **kept))


def _copy_caption(file: Path, conversion: Conversion) -> None:
    caption = file.with_suffix("." + (conversion.captions or "").lstrip("."))
    if not caption.is_file():
        raise UserError(f"{file} has no caption {caption.name}: add it, or leave out --captions")
    target = conversion.out / caption.name
    if target.exists() and not conversion.force:
        raise UserError(f"{target} is already there: give --force to overwrite it, or another folder")
    try:
        content = caption.read_bytes()
    except OSError as error:
        raise UserError(f"{caption} cannot be read ({error.strerror})") from error
    replace_file(target, lambda out: out.write(content))
    shutil.copymode(caption, target)
