"""From photographs to training data, as a user makes it: pictures, masks by `generate`, latent caches, masks in the caches."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from masked_loss_triton.cache.dataset import load_datasets
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.inject import inject_all, prepare
from masked_loss_triton.demo.encoder import encode
from masked_loss_triton.demo.output import write_tensors
from masked_loss_triton.demo.photos import PLACES, Photo, Warn
from masked_loss_triton.demo.tuning import Examples, captions_at
from masked_loss_triton.errors import UserError
from masked_loss_triton.generate.backends import WORDLESS, split_backend
from masked_loss_triton.generate.batches import Generation, generate_masks
from masked_loss_triton.generate.choice import choose_backend
from masked_loss_triton.generate.jobs import Job
from masked_loss_triton.generate.prompts import MaskRequest, Prompt
from masked_loss_triton.generate.saliency import INSTALL
from masked_loss_triton.masks.geometry import resize_to_bucket
from masked_loss_triton.masks.reading import read_picture

PHOTOS, MASKS, CACHES = "photos", "masks", "caches"  # folders of the report
SIDE = 512  # the shorter side of the pictures in the report; larger photographs are reduced
MASK_BLUR = 0.002  # of the shorter side: about a pixel
LEAST_SHARE, MOST_SHARE = 0.005, 0.995  # of the picture: outside this range there is no subject to tell from the rest


def make_dataset(photos: Sequence[Photo], folder: Path, side: int, warn: Warn) -> None:
    """Writes pictures, masks and latent caches of `side` x `side` pixels into the report folder.

    A photograph whose mask is next to nothing or next to everything is named to `warn` and left out.

    Raises:
        UserError: when none is left.
    """
    for name in (PHOTOS, MASKS, CACHES):
        (folder / name).mkdir()
    if any(photo.mask is None for photo in photos) and choose_backend(False, {})[0] == "grabcut":
        warn(f"the masks are GrabCut's: u2netp.onnx is not on this machine. Better ones: {INSTALL} (4.6 MB)")
    for photo in photos:
        file = write_photo(photo, folder / PHOTOS)
        share = float(photo.mask.mean()) / 255 if photo.mask is not None else generate_mask(file, folder / MASKS, photo)
        if LEAST_SHARE <= share <= MOST_SHARE:
            write_latents(file, folder / CACHES, side)
            continue
        file.unlink()
        (folder / MASKS / file.name).unlink(missing_ok=True)
        how = "its mask" if photo.mask is not None else "the generated mask"
        warn(f"skipped: {photo.name}: {how} covers {share:.1%} of it: give it an alpha channel that shows the subject")
    if not any((folder / CACHES).iterdir()):
        raise UserError("no photograph with a usable mask is left")
    add_masks(folder, side)


def write_photo(photo: Photo, folder: Path) -> Path:
    """Writes a photograph as a PNG, with its mask as the alpha channel where it has one, and returns the file."""
    height, width = photo.rgb.shape[:2]
    scale = min(1.0, SIDE / min(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Colours and alpha apart: reducing them together would darken the colours along the edge.
    planes = [photo.rgb] if photo.mask is None else [photo.rgb, photo.mask]
    pixels = np.dstack([cv2.resize(plane, size, interpolation=cv2.INTER_AREA) for plane in planes])
    Image.fromarray(pixels).save(folder / f"{photo.name}.png")
    return folder / f"{photo.name}.png"


def generate_mask(file: Path, folder: Path, photo: Photo) -> float:
    """Makes the mask of a picture as `masked-loss generate` does without words, and returns its mean, 0 to 1; where nothing is
    found it is 0.

    Raises:
        UserError: naming the file, when it cannot be made.
    """
    backend, _ = choose_backend(False, {})
    layer = Prompt(WORDLESS[split_backend(backend)[0]])
    request = MaskRequest(prompts=(layer,), reference_box=photo.box, mask_blur=MASK_BLUR)
    generation = Generation(request=request, masks=folder, backend=backend)
    (done,) = generate_masks([Job(file, folder / file.name, is_clip=False)], generation)
    if done.status == "problem":
        raise UserError(done.message)
    return done.mean


def write_latents(file: Path, folder: Path, side: int) -> None:
    """Encodes a picture and writes its cache as musubi-tuner's WAN script does, under its names and with its metadata."""
    rgb = read_picture(file).rgb
    height, width = rgb.shape[:2]
    latents = encode(resize_to_bucket(rgb, (side, side))).numpy()
    size = "x".join(map(str, latents.shape[1:]))
    metadata = {"architecture": "wan", "width": str(width), "height": str(height), "format_version": "1.0.1"}
    cache = folder / f"{file.stem}_{width:04d}x{height:04d}_wan.safetensors"
    write_tensors(cache, {f"latents_{size}_float32": latents}, metadata)


def add_masks(folder: Path, side: int) -> None:
    """Puts the masks into the caches as `masked-loss cache` does, by a dataset file like the trainer's.

    Raises:
        UserError: naming the file that is wrong.
    """
    general = {"resolution": [side, side], "enable_bucket": False, "alpha_mask": True, "require_mask": True}
    kinds = (("image_directory", PHOTOS), ("cache_directory", CACHES), ("mask_directory", MASKS))
    entry = {key: str(folder / name) for key, name in kinds}
    with tempfile.TemporaryDirectory() as place:
        config = Path(place) / "dataset.json"
        config.write_text(json.dumps({"general": general, "datasets": [entry]}), encoding="utf-8")
        (dataset,) = load_datasets(config)
    for outcome in inject_all([prepare(dataset, FAMILIES["wan"])], dtype="float32"):
        if outcome.status == "problem":
            raise UserError(outcome.message)


def read_caches(folder: Path, device: torch.device) -> Examples:
    """The caches of a report folder, stacked, in the order of their names: what the training reads."""
    names, latents, masks = [], [], []
    for cache in sorted((folder / CACHES).iterdir()):
        tensors = load_file(cache)
        names.append(cache.name.rsplit("_", 2)[0])
        latents.append(next(value for key, value in tensors.items() if key.startswith("latents_")))
        masks.append(next(value for key, value in tensors.items() if key.startswith("mask_weights_"))[0])  # (F, h, w)
    text = captions_at(names, list(PLACES), device)
    return Examples(names, torch.stack(latents).to(device), text, torch.stack(masks).to(device))
