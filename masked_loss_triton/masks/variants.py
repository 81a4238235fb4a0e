"""Copies of a data set whose captions name other places, for trainers that cache one caption for each picture.

A masked loss with a prior takes the background of a photograph out of what is learned. What the caption says of the background
is then untied from the subject only if the words change while the photograph stays: each copy says another place.

    variation = Variation(images=Path("photos"), masks=Path("masks"), output=Path("varied"), places=("in a meadow", "at sunset"))
    for done in vary_folder(variation, files):
        print(done.status, done.file, done.message)
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import NO_FILE, replace_file
from masked_loss_triton.files.captions import caption_of, check_extension
from masked_loss_triton.masks.listing import check_three_folders, labels_beside, masks_by_label
from masked_loss_triton.masks.sources import MaskDirectory, mask_directories

PLACE = "{place}"
MOVE = "move it, or give another --output"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variation:
    """What is copied, and what the copies say.

    Args:
        images: the pictures with their captions; sub-folders are mirrored.
        masks: their masks, by stem, in the same sub-folders; None copies none.
        output: gets `images`, with the captions, and `masks`.
        places: what the captions say in turn; in place of {place} in a caption, else behind it, after a comma.
        variants: copies of each picture, each with a place of its own.
        caption: the caption of pictures that have none; "" makes such pictures a problem.
        captions: the extension of caption files.

    Raises:
        UserError: for folders that do not exist and numbers out of range.
    """

    images: Path
    masks: Path | None
    output: Path
    places: tuple[str, ...]
    variants: int = 0
    caption: str = ""
    captions: str = ".txt"

    def __post_init__(self) -> None:
        for flag in ("images", "masks"):
            folder = getattr(self, flag)
            if folder is not None and not folder.is_dir():
                raise UserError(f"--{flag} {folder} is not a folder", 2)
        check_three_folders(self.images, self.masks or self.output / "masks", self.output)
        places = [" ".join(place.split()) for place in self.places]
        if len(places) < 2 or "" in places:
            raise UserError(f"--places must be two places or more, none of them empty, got {len(places)}", 2)
        if len(set(places)) < len(places):
            twice = next(place for place in places if places.count(place) > 1)
            raise UserError(f"--places has {twice!r} twice: leave one out", 2)
        if not 0 <= self.variants <= len(places):
            raise UserError(f"--variants must be between 1 and {len(places)}, the number of places", 2)
        check_extension(self.captions)
        object.__setattr__(self, "places", tuple(places))
        object.__setattr__(self, "variants", self.variants or min(4, len(places)))


@dataclasses.dataclass(frozen=True)
class Varied:
    """What became of one picture: "written", "present" or "problem"; what is wrong; one of its new captions."""

    file: Path
    status: str
    message: str = ""
    example: str = ""


def vary_folder(variation: Variation, files: list[Path]) -> Iterator[Varied]:
    """Copies pictures, masks and captions; yields what became of each picture."""
    directories = {} if variation.masks is None else mask_directories(files, variation.images, variation.masks)
    labels = labels_beside(files, directories)
    for file in files:
        try:
            yield _vary(file, variation, labels, directories.get(file.parent))
        except UserError as error:
            yield Varied(file, "problem", str(error))
        except OSError as error:
            yield Varied(file, "problem", f"{error.filename or file}: {error.strerror or error}")


def new_captions(caption: str, file: Path, variation: Variation) -> list[str]:
    """The captions of one picture's copies: places in their order, from one that depends on the picture's name, so that a data set
    uses all of them evenly."""
    text = " ".join(caption.split())
    name = file.relative_to(variation.images).with_suffix("").as_posix()
    first = int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:4], "big")
    places = [variation.places[(first + i) % len(variation.places)] for i in range(variation.variants)]
    return [text.replace(PLACE, place) if PLACE in text else f"{text.rstrip(' ,.')}, {place}" for place in places]


def _vary(file: Path, variation: Variation, labels: tuple[str, ...], directory: MaskDirectory | None) -> Varied:
    captions = new_captions(_caption(file, variation), file, variation)
    place = file.parent.relative_to(variation.images)
    masks = {}
    if variation.masks is not None:
        masks = masks_by_label(file, labels, directory, variation.masks / place)
    contents: dict[Path, bytes] = {}
    for number, caption in enumerate(captions, 1):
        images = variation.output / "images" / place
        contents[images / f"{file.stem}_{number}{file.suffix}"] = file.read_bytes()
        contents[images / f"{file.stem}_{number}.{variation.captions.lstrip('.')}"] = (caption + "\n").encode()
        for label, mask in masks.items():
            name = f"{file.stem}_{number}.{label}{mask.suffix}" if label else f"{file.stem}_{number}{mask.suffix}"
            contents[variation.output / "masks" / place / name] = mask.read_bytes()
    missing = [target for target in contents if not target.exists()]
    for target, content in contents.items():
        if target not in missing and target.read_bytes() != content:
            raise UserError(f"{target} is already there, with other contents: {MOVE}")
    for target in missing:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, functools.partial(_write, contents[target]), expected=NO_FILE)
    return Varied(file, "written" if missing else "present", example=captions[0])


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _caption(file: Path, variation: Variation) -> str:
    caption = caption_of(file, variation.captions)
    if not caption.is_file():
        if variation.caption:
            return variation.caption
        raise UserError(f"{file} has no caption {caption.name}: add one, or give --caption")
    try:
        text = caption.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{caption} is not UTF-8 text: save it as such") from error
    if not text.strip():
        raise UserError(f"{caption} is empty: write what the picture shows")
    return text
