"""Which files get a mask, where it goes, and which are done already."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from masked_loss_triton.errors import UserError
from masked_loss_triton.files.atomic import TEMPORARY, remove_leftovers
from masked_loss_triton.masks.frames import MASK_EXTENSIONS, VIDEO_EXTENSIONS

PICTURE_EXTENSIONS = MASK_EXTENSIONS  # every format that a mask may have, a picture may have


@dataclasses.dataclass(frozen=True)
class Job:
    """A picture or clip, and where its mask goes: a PNG for a picture, a folder of PNGs or an MKV for a clip."""

    source: Path
    target: Path
    is_clip: bool

    def existing(self) -> Path | None:
        """A mask of this picture or clip that `cache` would find, whoever made it; None where there is none."""
        places = [self.target]
        if self.is_clip:
            bare = self.target.with_name(self.source.stem)
            places = [bare, *(bare.with_name(bare.name + extension) for extension in VIDEO_EXTENSIONS)]
        else:
            stem = self.target.with_name(self.source.stem)
            places += [stem.with_name(stem.name + extension) for extension in MASK_EXTENSIONS]
        return next((place for place in places if place.exists()), None)


def find_jobs(input_dir: Path, output_dir: Path, clip_suffix: str) -> tuple[list[Job], list[str]]:
    """Every picture and clip below a folder, in the order of their paths, and those that cannot have a mask of their own.

    Sub-folders are mirrored. Masks are found by stem, so two pictures, or two clips, of one stem in one folder are a problem.

    Raises:
        UserError: when the folder does not exist, or is the one that masks go to.
    """
    if not input_dir.is_dir():
        raise UserError(f"--input_dir {input_dir} is not a folder", 2)
    output = output_dir.resolve()
    if input_dir.resolve() == output:
        raise UserError(
            "--input_dir and --output_dir must be two folders: masks are found by the stem of the picture", 2
        )
    jobs: list[Job] = []
    problems: list[str] = []
    taken: dict[tuple[Path, bool], Path] = {}
    for source in _files(input_dir, output):
        is_clip = source.suffix.lower() in VIDEO_EXTENSIONS
        bare = output_dir / source.relative_to(input_dir).parent / source.stem
        first = taken.setdefault((bare, is_clip), source)
        if first is not source:
            problems.append(f"{source} has the same stem as {first.name}: rename one of them")
        elif is_clip and source.with_suffix("").is_dir():
            problems.append(
                f"{source}: its frames and the masks of the folder {source.stem} would mix: rename one of them"
            )
        else:
            # Not with_suffix: a stem may have a point in it.
            jobs.append(Job(source, bare.with_name(bare.name + (clip_suffix if is_clip else ".png")), is_clip))
    return jobs, problems


def _files(folder: Path, output: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and (here / name).resolve() != output)
        for name in sorted(names):
            suffix = os.path.splitext(name)[1].lower()
            if not name.startswith(".") and suffix in (*PICTURE_EXTENSIONS, *VIDEO_EXTENSIONS):
                yield here / name


def clear_leftovers(output_dir: Path) -> None:
    """Deletes what a killed run left: temporary files, and folders of frames that were not finished."""
    for place, folders, _ in os.walk(output_dir):
        remove_leftovers(place)
        folders[:] = [name for name in folders if not TEMPORARY.fullmatch(name)]
