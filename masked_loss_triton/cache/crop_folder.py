"""Writes pictures, masks and captions cut to the masks: crops of the trainer's buckets that keep the whole subject.

cropping = Cropping(images=Path("photos"), masks=Path("masks"), output=Path("crops"), resolution=(960, 544))
for done in crop_folder(cropping, files):
    print([(one.status, one.zoom, one.message) for one in done])
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
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
from masked_loss_triton.masks.listing import PLAIN, check_three_folders, labels_beside, masks_by_label
from masked_loss_triton.masks.reading import read_mask_file, read_picture
from masked_loss_triton.masks.sources import MaskDirectory, align_to_picture, mask_directories
from masked_loss_triton.masks.zooms import FULL, check_zooms, zoomed

Contents = Callable[[], tuple[np.ndarray, dict[str, np.ndarray]]]

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
        zooms: a crop for each of them, called NAME_ZOOM, see `zoomed`; without any, one of the whole mask, called NAME.
        labels: of the masks NAME.LABEL.png that are cropped along and belong to the subject; empty takes those that are there
            if there are zooms, else none.

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
    zooms: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for flag in ("images", "masks"):
            if not getattr(self, flag).is_dir():
                raise UserError(f"--{flag} {getattr(self, flag)} is not a folder", 2)
        check_three_folders(self.images, self.masks, self.output)
        if min(self.resolution) < self.step or self.step < 1:
            raise UserError(f"--resolution must be {self.step} or more, got {' '.join(map(str, self.resolution))}", 2)
        if not 0 <= self.margin <= 2:
            raise UserError(f"--margin must be between 0 and 2, got {self.margin:g}", 2)
        check_extension(self.captions)

    def note(self, zoom: str) -> dict[str, object]:
        """What is written into each picture and mask."""
        made = {"resolution": list(self.resolution), "step": self.step, "margin": self.margin}
        return {**made, "zoom": zoom} if zoom else made


@dataclasses.dataclass(frozen=True)
class Cropped:
    """What became of one crop of a picture: "written", "present", "absent" where the picture has nothing of its zoom, or
    "problem"; what is wrong; how much it was enlarged, and whether the crop reaches beyond the picture."""

    file: Path
    status: str
    message: str = ""
    enlarged: float = 1.0
    beyond: bool = False
    zoom: str = ""


def crop_folder(cropping: Cropping, files: list[Path]) -> Iterator[list[Cropped]]:
    """Crops pictures in a few threads; yields what became of each, as they are done.

    Raises:
        UserError: for a zoom that is no label, and for two crops of one name.
    """
    directories = mask_directories(files, cropping.images, cropping.masks)
    labels = cropping.labels or (labels_beside(files, directories) if cropping.zooms else ())
    check_zooms(cropping.zooms, labels)
    _check_names(cropping, files)
    cropping = dataclasses.replace(cropping, labels=labels)
    yield from run_parallel(lambda file: _crop(file, cropping, directories.get(file.parent)), files, default_workers())


def _check_names(cropping: Cropping, files: list[Path]) -> None:
    """Raises UserError where a_b with the zoom c and a with the zoom b_c would be one file."""
    first: dict[Path, Path] = {}
    for file in files:
        for zoom in cropping.zooms:
            other = first.setdefault(file.with_name(f"{file.stem}_{zoom}"), file)
            if other != file:
                raise UserError(f"--zoom {zoom}: {file} and {other} would both give {file.stem}_{zoom}: rename one", 2)


def _crop(file: Path, cropping: Cropping, directory: MaskDirectory | None) -> list[Cropped]:
    """Makes all crops of a picture, which is read once, and only where one is missing."""
    place = file.parent.relative_to(cropping.images)
    try:
        paths = masks_by_label(file, cropping.labels, directory, cropping.masks / place)
    except UserError as error:
        return [Cropped(file, "problem", str(error))]
    contents = functools.cache(lambda: _read(file, paths))
    done = []
    for zoom in cropping.zooms or (PLAIN,):
        try:
            done.append(_crop_one(file, zoom, cropping, paths, contents))
        except UserError as error:
            done.append(Cropped(file, "problem", str(error), zoom=zoom))
        except OSError as error:
            done.append(Cropped(file, "problem", f"{error.filename or file}: {error.strerror or error}", zoom=zoom))
    # What is wrong with the picture itself is one line, not one for each zoom.
    return done[:1] if done[0].status == "problem" and len({one.message for one in done}) == 1 else done


def _read(file: Path, paths: Mapping[str, Path]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """A picture, and its masks on its pixels."""
    picture = read_picture(file, exif=False).rgb
    size = (picture.shape[1], picture.shape[0])
    masks = {
        label: align_to_picture(to_uint8(read_mask_file(path, exif=False)), size, path, file)
        for label, path in paths.items()
    }
    return picture, masks


def _crop_one(file: Path, zoom: str, cropping: Cropping, paths: Mapping[str, Path], contents: Contents) -> Cropped:
    """Makes one crop of a picture, with its masks and caption."""
    place, stem = file.parent.relative_to(cropping.images), f"{file.stem}_{zoom}" if zoom else file.stem
    masks_folder = cropping.output / "masks" / place
    target = cropping.output / "images" / place / f"{stem}.png"
    targets = {label: masks_folder / (f"{stem}.{label}.png" if label else f"{stem}.png") for label in paths}
    notes = {one: _note_of(one) for one in (target, *targets.values())}
    if all(note == cropping.note(zoom) for note in notes.values()):
        return Cropped(file, "present", zoom=zoom)
    picture, masks = contents()
    wanted = zoomed(zoom, masks)
    if not wanted.any():
        if zoom not in ("", FULL):
            return Cropped(file, "absent", zoom=zoom)
        raise UserError(f"{' and '.join(map(str, paths.values()))} is black: there is nothing to crop {file} to")
    caption = caption_of(file, cropping.captions)
    copy = None
    if caption.is_file():
        copy = copy_of_caption(caption, target.with_name(f"{stem}{caption.suffix}"), MOVE)
    buckets = buckets_of(cropping.resolution, cropping.step)
    box, bucket = crop_around(wanted, buckets, cropping.margin, enlarge=zoom not in ("", FULL))
    height, width = wanted.shape
    beyond = box[0] < -0.5 or box[1] < -0.5 or box[2] > width + 0.5 or box[3] > height + 0.5
    _save(target, cut(picture, box, bucket), cropping.note(zoom), notes[target])
    for label, mask in masks.items():
        _save(targets[label], cut(mask, box, bucket, "constant"), cropping.note(zoom), notes[targets[label]])
    if copy is not None:
        copy.run()
    return Cropped(file, "written", "", bucket[0] / (box[2] - box[0]), beyond, zoom)


def _note_of(target: Path) -> object:
    """The note of an earlier crop, or None where there is no file.

    Raises:
        UserError: for a file that is no crop.
    """
    if not target.exists():
        return None
    note = (read_png_note(target) or {}).get(NOTE)
    if note is None:
        raise UserError(f"{target} is already there, and is no crop: {MOVE}")
    return note


def _save(target: Path, pixels: np.ndarray, note: dict[str, object], there: object) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    text = png_note({NOTE: note})
    expected = NO_FILE if there is None else None
    replace_file(target, lambda file: Image.fromarray(pixels).save(file, "PNG", pnginfo=text), expected=expected)
