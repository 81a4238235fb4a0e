"""Writes pictures, masks and captions cut to the masks: crops of the trainer's buckets that keep the whole subject.

for done in crop_folder(Cropping(images=Path("photos"), masks=Path("masks"), output=Path("crops"), resolution=(960, 544))):
    print(done.status, done.file, done.message)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from masked_loss_triton.cache.items import buckets_of
from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import NO_FILE, replace_file
from masked_loss_triton.files.captions import caption_of, check_extension, copy_of_caption
from masked_loss_triton.files.notes import png_note, read_png_note
from masked_loss_triton.files.parallel import default_workers, run_parallel
from masked_loss_triton.masks.crops import crop_around, cut
from masked_loss_triton.masks.frames import to_uint8
from masked_loss_triton.masks.reading import read_mask_file, read_picture
from masked_loss_triton.masks.sources import MaskDirectory, align_to_picture, mask_directories

NOTE = "crop"
MOVE = "move it, or give another --output"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cropping:
    """What is cropped, and how.

    Args:
        images: the pictures; sub-folders are mirrored.
        masks: their masks, by stem, in the same sub-folders.
        output: gets `images`, with the captions, and `masks`.
        resolution: (width, height) of the dataset file; its buckets have about this area.
        step: sides of buckets are multiples of it.
        margin: around the mask, of its longer side.
        captions: the extension of caption files, copied where there are any.

    Raises:
        UserError: for folders that do not exist and numbers out of range.
    """

    images: Path
    masks: Path
    output: Path
    resolution: tuple[int, int]
    step: int = 16
    margin: float = 0.1
    captions: str = ".txt"

    def __post_init__(self) -> None:
        for flag in ("images", "masks"):
            if not getattr(self, flag).is_dir():
                raise UserError(f"--{flag} {getattr(self, flag)} is not a folder", 2)
        if min(self.resolution) < self.step or self.step < 1:
            raise UserError(f"--resolution must be {self.step} or more, got {' '.join(map(str, self.resolution))}", 2)
        if not 0 <= self.margin <= 2:
            raise UserError(f"--margin must be between 0 and 2, got {self.margin:g}", 2)
        check_extension(self.captions)

    def note(self) -> dict[str, object]:
        """What is written into each picture and mask."""
        return {"resolution": list(self.resolution), "step": self.step, "margin": self.margin}


@dataclasses.dataclass(frozen=True)
class Cropped:
    """What became of one picture: "written", "present" or "problem"; what is wrong; how much it was enlarged, and whether the crop
    reaches beyond the picture."""

    file: Path
    status: str
    message: str = ""
    enlarged: float = 1.0
    beyond: bool = False


def crop_folder(cropping: Cropping, files: list[Path]) -> Iterator[Cropped]:
    """Crops pictures in a few threads; yields what became of each, as they are done."""
    directories = mask_directories(files, cropping.images, cropping.masks)
    yield from run_parallel(lambda file: _guarded(file, cropping, directories), files, default_workers())


def _guarded(file: Path, cropping: Cropping, directories: dict[Path, MaskDirectory]) -> Cropped:
    try:
        return _crop(file, cropping, directories.get(file.parent))
    except UserError as error:
        return Cropped(file, "problem", str(error))
    except OSError as error:
        return Cropped(file, "problem", f"{file}: {error.strerror or error}")


def _crop(file: Path, cropping: Cropping, directory: MaskDirectory | None) -> Cropped:
    place = file.parent.relative_to(cropping.images)
    targets = [cropping.output / kind / place / f"{file.stem}.png" for kind in ("images", "masks")]
    there = [(read_png_note(target) or {}).get(NOTE) if target.exists() else None for target in targets]
    if all(note == cropping.note() for note in there):
        return Cropped(file, "present")
    for target, note in zip(targets, there, strict=True):
        if note is None and target.exists():
            raise UserError(f"{target} is already there, and is no crop: {MOVE}")
    mask_path = directory.find(file.stem, video=False) if directory else None
    if mask_path is None:
        raise UserError(f"{file} has no mask in {cropping.masks / place}: add {file.stem}.png")
    picture = read_picture(file, exif=False).rgb
    size = (picture.shape[1], picture.shape[0])
    mask = align_to_picture(to_uint8(read_mask_file(mask_path, exif=False)), size, mask_path, file)
    if not mask.any():
        raise UserError(f"{mask_path} is black: there is nothing to crop {file} to")
    caption = caption_of(file, cropping.captions)
    copy = copy_of_caption(caption, targets[0].parent, MOVE) if caption.is_file() else None
    box, bucket = crop_around(mask, buckets_of(cropping.resolution, cropping.step), cropping.margin)
    beyond = box[0] < -0.5 or box[1] < -0.5 or box[2] > size[0] + 0.5 or box[3] > size[1] + 0.5
    for target, pixels in zip(targets, (cut(picture, box, bucket), cut(mask, box, bucket, "constant")), strict=True):
        _save(target, pixels, cropping, there)
    if copy is not None:
        copy.run()
    return Cropped(file, "written", "", bucket[0] / (box[2] - box[0]), beyond)


def _save(target: Path, pixels: np.ndarray, cropping: Cropping, there: list[object]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    note = png_note({NOTE: cropping.note()})
    expected = None if any(there) else NO_FILE
    replace_file(target, lambda file: Image.fromarray(pixels).save(file, "PNG", pnginfo=note), expected=expected)
