"""The frames of a clip's mask: a folder of pictures or a video, through the trainer's own selection of frames.

musubi-tuner drops frames to reach the frame rate of the model, then cuts windows out of what is left. A mask has to lose
the same frames, or it runs ahead of the subject.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from masked_loss_triton.errors import UserError, install_command
from masked_loss_triton.masks.reading import open_image, read_alpha, read_mask_file, read_picture, to_float, unreadable

# As musubi-tuner looks for them, both cases.
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
VIDEO_EXTENSIONS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")
# Mask files may also have these: formats that the trainer does not read as pictures.
MASK_EXTENSIONS = (*IMAGE_EXTENSIONS, ".tif", ".tiff", ".gif", ".tga", ".ppm", ".pgm", ".pbm", ".jp2")
# Pictures and videos that neither the trainer nor this program reads: they are told of, not passed over in silence.
UNREAD_EXTENSIONS = (
    *(".heic", ".heif", ".hif", ".psd", ".xcf", ".exr", ".hdr", ".npy", ".npz", ".svg", ".raw"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".ts", ".mts", ".m2ts", ".3gp", ".ogv", ".vob"),
)
# FFmpeg's own decoders of these leave the alpha channel of a WebM out.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


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


def frame_files(folder: str | os.PathLike[str], extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> list[Path]:
    """Lists the pictures of a folder as the trainer does: in the order of their names as text, hidden files left out."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    return [Path(folder, name) for name in names if os.path.splitext(name)[1].lower() in extensions]


def mask_frame_files(folder: str | os.PathLike[str], clip: str | os.PathLike[str] | None = None) -> list[Path]:
    """Lists the frames of a mask in the order of the frames of its clip.

    Where the clip is a folder whose frames have the same names, that is the clip's order; else the order of the numbers at
    the end of the names, so that 2.png comes before 10.png.

    Args:
        folder: one picture for each frame.
        clip: the clip, a folder of pictures or a video; None when it is not known.

    Raises:
        UserError: naming the folder, when two frames have one number, or when numbers are missing and the clip does not
            have just as many frames as there are.
    """
    files = frame_files(folder, MASK_EXTENSIONS)
    if clip is not None and os.path.isdir(clip):
        order = {file.stem: index for index, file in enumerate(frame_files(clip))}
        if order.keys() == {file.stem for file in files}:
            return sorted(files, key=lambda file: order[file.stem])
    numbers = {file: int(match[0]) for file in files if (match := re.search(r"\d+$", file.stem))}
    if len(numbers) < len(files):
        return files
    heads = {re.sub(r"\d+$", "", file.stem) for file in files}
    files.sort(key=lambda file: (re.sub(r"\d+$", "", file.stem), numbers[file]))
    for before, after in itertools.pairwise(files) if len(heads) == 1 else ():
        if numbers[after] == numbers[before]:
            raise UserError(f"{folder} has two frames {numbers[after]}, {before.name} and {after.name}: remove one")
        if numbers[after] > numbers[before] + 1 and clip is not None and clip_frame_count(clip) != len(files):
            raise UserError(
                f"{folder} has no frame {numbers[before] + 1}, between {before.name} and {after.name}: make a mask for "
                "every frame"
            )
    return files


def clip_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) of a clip's frames, pixels: a video file, or a folder of pictures.

    Raises:
        UserError: naming the clip, when it cannot be read.
    """
    if os.path.isdir(path):
        files = frame_files(path)
        if not files:
            raise UserError(f"{path} has no pictures in it: add the frames or remove the folder")
        with open_image(files[0]) as image:
            return image.size
    with _Video(path) as stream:
        return stream.width, stream.height


def clip_frame_count(path: str | os.PathLike[str]) -> int:
    """Number of frames of a clip: as its container says, else (Matroska, WebM) as many as are in it; pictures in a folder."""
    if os.path.isdir(path):
        return len(frame_files(path))
    with _Video(path) as stream:
        return stream.frames or sum(_is_frame(packet) for packet in stream.container.demux(stream))


def _is_frame(packet: Any) -> bool:
    """Whether a packet of a video is a frame that is shown: the last one is empty, and VP8 has frames for reference alone."""
    return packet.size > 0 and not (packet.stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10)


def mask_frame_count(path: str | os.PathLike[str]) -> int:
    """Number of frames of a clip's mask, a folder of pictures or a video."""
    return len(frame_files(path, MASK_EXTENSIONS)) if os.path.isdir(path) else clip_frame_count(path)


def frame_rate(path: str | os.PathLike[str]) -> Fraction:
    """Frames per second of a video; 24 where its container does not say.

    Raises:
        UserError: naming the clip, when it cannot be read.
    """
    with _Video(path) as stream:
        return stream.average_rate or Fraction(24)


def read_frames(
    path: str | os.PathLike[str], alpha: bool = False, clip: str | os.PathLike[str] | None = None
) -> Iterator[np.ndarray]:
    """Decodes the frames of a mask one after the other, each (H, W) uint8: a folder of pictures or a video.

    Args:
        path: the folder or video.
        alpha: read the alpha channel instead of the brightness. Frames without one end the iteration at once.
        clip: what the mask belongs to, which decides the order of a folder's frames; None when it is not known.

    Raises:
        UserError: naming the file, when a frame cannot be read.
    """
    if os.path.isdir(path):
        for file in frame_files(path) if alpha else mask_frame_files(path, clip):
            frame = read_alpha(file, exif=False) if alpha else read_mask_file(file, exif=False)
            if frame is None:
                return
            yield to_uint8(frame)
        return
    with _Video(path) as stream:
        if not alpha:
            for frame in stream.container.decode(stream):
                # Through RGB: swscale leaves limited-range luma as it is when asked for grey, so white would be 235.
                yield np.array(frame.to_image().convert("L"))
        elif _pixels_with_alpha(stream):
            for frame in _frames_with_alpha(stream):
                yield np.ascontiguousarray(frame.to_ndarray(format="rgba")[..., 3])


def read_clip(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """The frames of a clip, (H, W, 3) uint8: a folder of pictures or a video, as the trainer sees them.

    Raises:
        UserError: naming the file, when a frame cannot be read.
    """
    if os.path.isdir(path):
        for file in frame_files(path):
            yield read_picture(file, exif=False).rgb
        return
    with _Video(path) as stream:
        for frame in stream.container.decode(stream):
            yield frame.to_ndarray(format="rgb24")


def has_alpha_frames(path: str | os.PathLike[str]) -> bool:
    """Whether a clip, a folder of pictures or a video, has an alpha channel. Decodes no frame of a video."""
    if os.path.isdir(path):
        files = frame_files(path)
        return bool(files) and read_alpha(files[0], exif=False) is not None
    with _Video(path) as stream:
        return _pixels_with_alpha(stream)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """float32 in [0, 1] to uint8 in [0, 255], rounded; uint8 as it is."""
    return values if values.dtype == np.uint8 else np.rint(to_float(values) * np.float32(255)).astype(np.uint8)


def animation_frames(path: Path) -> int:
    """The frames of an animated picture, of which the first is read; 1 for any other. Reads no pixels.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    if path.suffix.lower() not in (".gif", ".webp", ".png", ".avif"):
        return 1
    with open_image(path) as image:
        return int(getattr(image, "n_frames", 1))


def refuse_animation(path: Path) -> None:
    """Refuses an animated picture as the still mask of a clip.

    Raises:
        UserError: naming the file, of which only the first frame would count.
    """
    frames = animation_frames(path)
    if frames > 1:
        raise UserError(f"{path} is an animation of {frames} frames: give a folder of pictures or a video instead")


def _pixels_with_alpha(stream: Any) -> bool:
    webm = stream.metadata.get("alpha_mode") == "1" and stream.codec_context.name in ALPHA_DECODERS
    return webm or any(component.is_alpha for component in stream.codec_context.format.components)


def _frames_with_alpha(stream: Any) -> Iterator[Any]:
    import av

    decoder = ALPHA_DECODERS.get(stream.codec_context.name)
    if decoder is None:
        yield from stream.container.decode(stream)
        return
    context: Any = av.CodecContext.create(decoder, "r")
    for packet in stream.container.demux(stream):
        yield from context.decode(packet)


class _Video:
    """Opens the first video stream of a file; whatever the decoder raises becomes one UserError."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def __enter__(self) -> Any:
        try:
            import av
        except ModuleNotFoundError as error:
            raise UserError(f"clips need the package av: {install_command('cache')}", 2) from error
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
