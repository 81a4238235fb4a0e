"""From photographs to training data, by the path a trainer takes: RGBA files, latent caches with masks, tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from masked_loss_triton.demo.encoder import PATCH, encode
from masked_loss_triton.demo.photos import EXTENSIONS, MASK_SUFFIX, MAX_PHOTOS, Photo, find_subject
from masked_loss_triton.demo.tensors import write_tensors
from masked_loss_triton.demo.training import Examples
from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.geometry import resize_to_bucket, to_latent
from masked_loss_triton.masks.reading import read_mask, read_picture

RGBA_SIDE = 512  # the shorter side of the RGBA files; larger photographs are reduced
NAME_LENGTH = 80  # characters: file systems take 255 bytes, and the caches' names add to it
LEAST_SHARE, MOST_SHARE = 0.005, 0.995  # of the picture: outside this range there is no subject to tell from the rest

Warn = Callable[[str], None]


def read_folder(folder: Path, warn: Warn) -> list[Photo]:
    """The photographs of a folder, with the mask each has: its alpha channel, else NAME_mask.* beside it, else none yet.

    Files that cannot be read are named to `warn`, in one line each, and left out.

    Raises:
        UserError: the folder is missing or holds no photograph that can be read.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: {'not a folder' if folder.exists() else 'there is no such folder'}", 2)
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in EXTENSIONS)
    stems = {file.stem for file in files}
    masks = {file.stem: file for file in files if file.stem.endswith(MASK_SUFFIX)}
    # dog_mask.png is a mask only where there is a dog.
    pictures = [file for file in files if file not in masks.values() or file.stem[: -len(MASK_SUFFIX)] not in stems]
    photos: list[Photo] = []
    for file in pictures:
        if len(photos) == MAX_PHOTOS:
            warn(f"--images: only the first {MAX_PHOTOS} photographs of {folder} are used")
            break
        try:
            photo = _read_photo(file, masks.get(file.stem + MASK_SUFFIX))
        except UserError as error:
            warn(f"skipped: {error}")
            continue
        photos.append(dataclasses.replace(photo, name=_new_name(file.stem, {other.name for other in photos})))
    if not photos:
        kinds = ", ".join(extension[1:] for extension in EXTENSIONS)
        raise UserError(f"--images {folder}: no photograph in it can be used (looked for {kinds})")
    return photos


def _new_name(stem: str, taken: Collection[str]) -> str:
    """A name for files and captions: valid text of moderate length, and not taken (cat.jpg and cat.png have one stem)."""
    name = stem.encode(errors="replace").decode()[:NAME_LENGTH]
    return next(new for new in (name, *(f"{name}_{i}" for i in range(2, MAX_PHOTOS + 1))) if new not in taken)


def _read_photo(file: Path, mask_file: Path | None) -> Photo:
    picture, mask = read_picture(file), read_mask(file, mask_file)
    if mask.source == "full":
        return Photo(file.stem, picture.rgb)
    height, width = picture.rgb.shape[:2]
    return Photo(file.stem, picture.rgb, resize_to_bucket(mask.values, (width, height)))


def write_rgba(photos: Sequence[Photo], folder: Path, warn: Warn) -> list[Path]:
    """Writes each photograph with its mask as alpha, GrabCut finding the mask where there is none, and returns the files.

    A photograph whose mask is next to nothing or next to everything is named to `warn` and left out.

    Raises:
        UserError: when none is left.
    """
    folder.mkdir()
    files = []
    for photo in photos:
        alpha = find_subject(photo) if photo.alpha is None else photo.alpha
        share = float(alpha.mean())
        if not LEAST_SHARE <= share <= MOST_SHARE:
            how = "GrabCut's mask" if photo.alpha is None else "its mask"
            warn(
                f"skipped: {photo.name}: {how} covers {share:.1%} of it: give it an alpha channel that shows the subject"
            )
            continue
        height, width = photo.rgb.shape[:2]
        scale = min(1.0, RGBA_SIDE / min(height, width))
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        # Colours and alpha apart: reducing them together would darken the colours along the edge.
        rgb = cv2.resize(photo.rgb, size, interpolation=cv2.INTER_AREA)
        values = cv2.resize(np.round(alpha * 255).astype(np.uint8), size, interpolation=cv2.INTER_AREA)
        files.append(folder / f"{photo.name}.png")
        Image.fromarray(np.dstack([rgb, values])).save(files[-1])
    if not files:
        raise UserError("no photograph with a usable mask is left")
    return files


def read_square(file: Path, side: int) -> np.ndarray:
    """A picture file at the size it is trained at: uint8 (side, side, 3), the centre of the picture."""
    return resize_to_bucket(read_picture(file).rgb, (side, side))


def write_cache(file: Path, folder: Path, side: int) -> Path:
    """Encodes an RGBA file as `side` x `side` pixels and writes a latent cache with musubi-tuner's names and layout.

    Keys: `latents_1xhxw_float32` (16, 1, h, w) and `mask_weights_1xhxw_float32` (1, h, w): frames, height, width.
    """
    picture = read_picture(file)
    mask = read_mask(file, require_mask=True)
    latents = encode(resize_to_bucket(picture.rgb, (side, side)))
    frames, height, width = latents.shape[1:]
    weights = torch.from_numpy(to_latent(resize_to_bucket(mask.values, (side, side)), (height, width)))
    size = f"{frames}x{height}x{width}_float32"
    tensors = {f"latents_{size}": latents, f"mask_weights_{size}": weights.unsqueeze(0)}
    picture_height, picture_width = picture.rgb.shape[:2]
    metadata = {
        "architecture": "wan",
        "width": str(picture_width),
        "height": str(picture_height),
        "format_version": "1.0.1",
    }
    cache = folder / f"{file.stem}_{picture_width:04d}x{picture_height:04d}_wan.safetensors"
    write_tensors(cache, tensors, metadata)
    return cache


def write_caches(files: Sequence[Path], folder: Path, side: int) -> list[Path]:
    """`write_cache` for every file."""
    assert side % (2 * PATCH) == 0, "the transformer's patches are two latents wide"
    folder.mkdir()
    return [write_cache(file, folder, side) for file in files]


def read_caches(caches: Sequence[Path], device: torch.device) -> Examples:
    """The caches, stacked: what the training reads."""
    names, latents, masks = [], [], []
    for cache in caches:
        tensors = load_file(cache)
        names.append(cache.name.rsplit("_", 2)[0])
        latents.append(next(value for key, value in tensors.items() if key.startswith("latents_")))
        masks.append(next(value for key, value in tensors.items() if key.startswith("mask_weights_")))
    return Examples(names, torch.stack(latents).to(device), torch.stack(masks).to(device))
