"""Reads picture and mask files as arrays: one error line for each file that cannot be read.

A mask comes from the picture's alpha channel, else from a mask file, else it is full weight or an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from masked_loss_triton.errors import UserError

# Pictures and photographs of kinds that are not read here, nor by the trainers.
UNREAD_EXTENSIONS = (
    *(
        ".heic",
        ".heif",
        ".hif",
        ".jfif",
        ".jpe",
        ".psd",
        ".psb",
        ".xcf",
        ".kra",
        ".ora",
        ".svg",
        ".eps",
        ".pdf",
        ".exr",
        ".hdr",
    ),
    *(
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".raf",
        ".rw2",
        ".orf",
        ".apng",
        ".dds",
        ".ico",
        ".qoi",
        ".m2ts",
        ".ts",
        ".3gp",
    ),
)
# What is decoded: not the formats that run other programs (EPS) or that no trainer reads. JXL and HEIF come with plugins.
FORMATS = (
    *("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "TGA", "PPM", "JPEG2000", "AVIF", "JXL", "HEIF"),
)
MAX_PIXELS = 2**27  # 134 million: a picture of more would take gigabytes
# Larger ones are decoded one at a time: each takes up to 16 bytes a pixel for a moment, and there are many threads.
LARGE_PIXELS = 2**25
LARGE_BLOCK = 2**26  # bytes
_one_large = threading.RLock()
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")


@dataclasses.dataclass(frozen=True)
class Picture:
    """A decoded picture. Colours and alpha are apart, so that nothing downstream can premultiply them.

    Attributes:
        rgb: (H, W, 3) uint8, the stored colours, also where the picture is transparent.
        alpha: (H, W) float32 in [0, 1], or None where the file has no transparency.
        path: the file it came from.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    path: Path


def unread_text(unread: Counter[str]) -> str:
    """One line about files in formats that are not read: how many of which, and how to convert them."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(unread.items()))
    return f"{kinds}: not read here nor by the trainers; convert them, for example with `magick mogrify -format png`"


def read_picture(path: str | os.PathLike[str], exif: bool = True) -> Picture:
    """Decodes one picture: the first frame of an animation, 16 bits per channel brought to 8, CMYK to RGB.

    Args:
        path: one of `FORMATS`, whatever the ending of its name says.
        exif: turn the picture upright as its EXIF orientation says. musubi-tuner, sd-scripts and diffusion-pipe do not.

    Raises:
        UserError: naming the file, for one that is missing, cut short, no picture, or too large to decode.
    """
    with open_image(path, exif) as image:
        rgb, alpha = _rgb(image, path), _alpha(image)
    return Picture(rgb, None if alpha is None else to_float(alpha), Path(path))


def read_mask_file(path: str | os.PathLike[str], exif: bool = True) -> np.ndarray:
    """Decodes a mask file to (H, W): uint8 where the file has at most 8 bits per channel, else float32 in [0, 1].

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    with open_image(path, exif) as image:
        return _grey(image, path)


def read_alpha(path: str | os.PathLike[str], exif: bool = True) -> np.ndarray | None:
    """The alpha channel of a picture as (H, W) uint8 (float32 for a keyed 16-bit picture), or None where it has none.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    with open_image(path, exif) as image:
        return _alpha(image)


def has_alpha(image: Image.Image) -> bool:
    """Whether a picture carries transparency: a channel, or a transparent palette entry or colour. Reads no pixels."""
    return image.mode in ALPHA_MODES or "transparency" in image.info


def has_16_bits(image: Image.Image) -> bool:
    """Whether a picture has more than 8 bits per channel in its file. Asks before its pixels are decoded."""
    stored = "".join(str(tile[3]) for tile in getattr(image, "tile", ()))
    return image.mode.startswith(("I", "F")) or ";16" in stored


def opaque(alpha: np.ndarray) -> bool:
    """Whether an alpha channel, uint8 or float32, hides nothing."""
    return bool(alpha.min() >= (255 if alpha.dtype == np.uint8 else 1))


def to_float(values: np.ndarray) -> np.ndarray:
    """uint8 in [0, 255] to float32 in [0, 1]; float32 as it is."""
    return values if values.dtype == np.float32 else values.astype(np.float32) / np.float32(255)


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str], exif: bool = False) -> Iterator[Image.Image]:
    """Opens a picture for decoding. Whatever a decoder raises becomes one UserError.

    Large pictures are decoded one at a time, whatever the number of threads.

    Args:
        path: one of `FORMATS`.
        exif: turn it upright.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    try:
        check_is_file(path)
        with Image.open(path, formats=_formats()) as image, contextlib.ExitStack() as stack:
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise UserError(_too_large(path, f"{image.width}x{image.height} pixels"))
            if pixels > LARGE_PIXELS:
                stack.enter_context(_one_large)
                # Blocks that the C library gives back at once; smaller ones it would keep, for each thread.
                Image.core.set_block_size(LARGE_BLOCK)
            yield ImageOps.exif_transpose(image) if exif else image
    except UserError:
        raise
    except Exception as error:
        # Broken files make decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError, ...
        raise unreadable(path, error) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow and its plugins have."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _too_large(path: str | os.PathLike[str], size: str) -> str:
    return f"{path} has {size}, more than the {MAX_PIXELS // 10**6} million that are decoded: make it smaller"


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Refuses folders, pipes and devices: opening a pipe called x.png would block the program for ever.

    Raises:
        UserError: naming what is no file.
        OSError: when it does not exist or cannot be reached.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path} is not a file: remove it or correct the path")


def unreadable(path: str | os.PathLike[str], error: Exception) -> UserError:
    """The error line for a picture file that could not be opened or decoded."""
    if isinstance(error, FileNotFoundError):
        return UserError(f"{path} does not exist: correct the path or add the file")
    if isinstance(error, PermissionError):
        return UserError(f"{path} may not be read: change its permissions")
    if isinstance(error, OSError) and error.errno is not None:
        return UserError(f"{path} cannot be opened ({error.strerror}): replace or remove it")
    try:
        if os.path.getsize(path) == 0:
            return UserError(f"{path} is empty (0 bytes): replace or remove it")
    except OSError:
        pass
    if isinstance(error, Image.UnidentifiedImageError):
        return UserError(f"{path} is not a picture in a known format, or is damaged: save it again or remove it")
    if isinstance(error, Image.DecompressionBombError):
        return UserError(_too_large(path, "too many pixels"))
    reason = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{path} is damaged and cannot be decoded ({reason}): save it again or remove it")


def _rgb(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        grey = np.rint(_high_depth(image, path) * 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode not in ("RGB", "RGBA") and has_alpha(image):
        # Through RGBA: colours under transparent pixels are kept.
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        return np.ascontiguousarray(np.asarray(image)[..., :3])
    return np.array(image.convert("RGB"))


def _alpha(image: Image.Image) -> np.ndarray | None:
    if not has_alpha(image):
        return None
    if image.mode.startswith(("I", "F")):
        key = image.info["transparency"]
        return (np.asarray(image) != key).astype(np.float32)
    if image.mode in ("RGBA", "LA", "RGBa", "La"):
        return np.array(image.getchannel("A" if image.mode in ("RGBA", "LA") else "a"))
    return np.array(image.convert("RGBA").getchannel("A"))


def _grey(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
    if image.mode.startswith(("I", "F")):
        return _high_depth(image, path)
    if has_alpha(image):
        rgba = image.convert("RGBA")
        black = Image.new("L", image.size)
        return np.array(Image.composite(rgba.convert("L"), black, rgba.getchannel("A")))
    return np.array(image if image.mode == "L" else image.convert("L"))


def _high_depth(image: Image.Image, path: str | os.PathLike[str]) -> np.ndarray:
    """Modes I;16*, I and F as (H, W) float32 in [0, 1]."""
    values = np.asarray(image).astype(np.float32)
    if image.mode.startswith("I"):
        values = values / np.float32(65535)
    if not np.isfinite(values).all() or (values.size and (values.min() < 0 or values.max() > 1)):
        kind = "between 0 and 65535" if image.mode.startswith("I") else "between 0 and 1"
        raise UserError(f"{path}: values in mode {image.mode} must be {kind}: save it with 8 or 16 bits per channel")
    return values
