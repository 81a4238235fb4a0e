"""The frames of a clip's mask: a folder of pictures or a video, through the trainer's own selection of frames.

musubi-tuner drops frames to reach the frame rate of the model, then cuts windows out of what is left. A mask has to lose
the same frames, or it runs ahead of the subject.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.reading import read_alpha, read_mask_file, read_picture, to_float, unreadable

# As musubi-tuner looks for them, both cases.
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
VIDEO_EXTENSIONS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")
# Mask files may also have these: formats that the trainer does not read as pictures.
MASK_EXTENSIONS = (*IMAGE_EXTENSIONS, ".tif", ".tiff", ".gif", ".tga", ".ppm", ".pgm", ".pbm", ".jp2")


def kept_frames(count: int | None, source_fps: float | None, target_fps: float | None) -> Iterator[int]:
    """Indices of the frames that the trainer keeps of a clip; all of them without a conversion.

    The position of frame i at the target rate is the sum of i steps target/source, rounded down; a frame that lands on its
    predecessor's position is dropped. The sum is kept in floating point, step by step, because its rounding decides.

    Args:
        count: number of frames in the clip, or None for no end.
        source_fps, target_fps: frames per second; None converts nothing.

    Source: musubi-tuner 0.3.4, dataset/media_utils.py.
    """
    index = 0
    position, previous = 0.0, -1
    step = 1.0 if source_fps is None or target_fps is None else target_fps / source_fps
    while count is None or index < count:
        if int(position) != previous:
            previous = int(position)
            yield index
        position += step
        index += 1


def frame_files(folder: str | os.PathLike[str], extensions: tuple[str, ...] = MASK_EXTENSIONS) -> list[Path]:
    """The pictures of a folder in the order of their names."""
    with os.scandir(folder) as entries:
        return sorted(Path(entry.path) for entry in entries if Path(entry.name).suffix.lower() in extensions)


def clip_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) of a clip's frames, pixels: a video file, or a folder of pictures.

    Raises:
        UserError: naming the clip, when it cannot be read.
    """
    if os.path.isdir(path):
        from masked_loss_triton.masks.reading import open_image

        files = frame_files(path, IMAGE_EXTENSIONS)
        if not files:
            raise UserError(f"{path} has no pictures in it: add the frames or remove the folder")
        with open_image(files[0]) as image:
            return image.size
    with _Video(path) as stream:
        return stream.width, stream.height


def clip_frame_count(path: str | os.PathLike[str]) -> int:
    """Number of frames of a clip as its container says, or 0 where it does not say; pictures in a folder."""
    if os.path.isdir(path):
        return len(frame_files(path, IMAGE_EXTENSIONS))
    with _Video(path) as stream:
        return stream.frames


def frame_rate(path: str | os.PathLike[str]) -> Fraction:
    """Frames per second of a video; 24 where its container does not say.

    Raises:
        UserError: naming the clip, when it cannot be read.
    """
    with _Video(path) as stream:
        return stream.average_rate or Fraction(24)


def read_frames(path: str | os.PathLike[str], alpha: bool = False) -> Iterator[np.ndarray]:
    """The frames of a mask, one after the other, each (H, W) uint8: a folder of pictures or a video.

    Args:
        path: the folder or video.
        alpha: read the alpha channel instead of the brightness. Frames without one end the iteration at once.

    Raises:
        UserError: naming the file, when a frame cannot be read.
    """
    if os.path.isdir(path):
        for file in frame_files(path, IMAGE_EXTENSIONS if alpha else MASK_EXTENSIONS):
            frame = read_alpha(file, exif=False) if alpha else read_mask_file(file, exif=False)
            if frame is None:
                return
            yield to_uint8(frame)
        return
    with _Video(path) as stream:
        if alpha and not _pixels_with_alpha(stream):
            return
        for frame in stream.container.decode(stream):
            if alpha:
                yield np.ascontiguousarray(frame.to_ndarray(format="rgba")[..., 3])
            else:
                # Through RGB: swscale leaves limited-range luma as it is when asked for grey, so white would be 235.
                yield np.array(frame.to_image().convert("L"))


def read_clip(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """The frames of a clip, (H, W, 3) uint8: a folder of pictures or a video, as the trainer sees them.

    Raises:
        UserError: naming the file, when a frame cannot be read.
    """
    if os.path.isdir(path):
        for file in frame_files(path, IMAGE_EXTENSIONS):
            yield read_picture(file, exif=False).rgb
        return
    with _Video(path) as stream:
        for frame in stream.container.decode(stream):
            yield frame.to_ndarray(format="rgb24")


def has_alpha_frames(path: str | os.PathLike[str]) -> bool:
    """Whether a clip, a folder of pictures or a video, has an alpha channel. Decodes no frame of a video."""
    if os.path.isdir(path):
        files = frame_files(path, IMAGE_EXTENSIONS)
        return bool(files) and read_alpha(files[0], exif=False) is not None
    with _Video(path) as stream:
        return _pixels_with_alpha(stream)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """float32 in [0, 1] to uint8 in [0, 255], rounded; uint8 as it is."""
    return values if values.dtype == np.uint8 else np.rint(to_float(values) * np.float32(255)).astype(np.uint8)


def _pixels_with_alpha(stream: Any) -> bool:
    return any(component.is_alpha for component in stream.codec_context.format.components)


class _Video:
    """Opens the first video stream of a file; whatever the decoder raises becomes one UserError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            import av
        except ModuleNotFoundError as error:
            raise UserError("clips need the package av: pip install 'masked_loss_triton[cache]'", 2) from error
        try:
            if not os.path.isfile(self.path):
                raise FileNotFoundError(self.path)
            self.container = av.open(os.fspath(self.path))
            if not self.container.streams.video:
                self.container.close()
                raise UserError(f"{self.path} has no video in it: replace or remove it")
        except UserError:
            raise
        except Exception as error:
            raise _unreadable_video(self.path, error) from error
        return self.container.streams.video[0]

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import av

        self.container.close()
        if isinstance(error, (av.error.FFmpegError, ValueError)):
            raise _unreadable_video(self.path, error) from error


def _unreadable_video(path: str | os.PathLike[str], error: Exception) -> UserError:
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return unreadable(path, error)
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return UserError(f"{path} cannot be decoded as a video ({reason}): replace or remove it")
