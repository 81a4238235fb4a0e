"""The mask of a stem is found in one pass, in a fixed order, and fitted to the stored pixels of its picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.errors import UserError
from masked_loss_triton.masks.frames import (
    clip_frame_count,
    frame_files,
    has_alpha_frames,
    kept_frames,
    mask_frame_files,
    read_frames,
)
from masked_loss_triton.masks.sources import Candidate, MaskDirectory, align_to_picture, aspect_differs, read_still


def test_masks_are_found_by_stem_whatever_the_format(tmp_path):
    for name in ("a.png", "b.WEBP", "c.tiff", "d.jpg", "d.png", "e.txt", "clip.mp4", "clip.png", "two.dots.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "clip").mkdir()
    (tmp_path / "._a.png").touch()  # macOS, on a disk of another system
    (tmp_path / ".replaced-masks").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    masks = MaskDirectory(tmp_path)
    found = {stem: masks.find(stem, video=False) for stem in ("a", "b", "c", "d", "e", "two.dots", "folder")}
    names = {stem: path and path.name for stem, path in found.items()}
    assert names == {
        "a": "a.png",
        "b": "b.WEBP",
        "c": "c.tiff",
        "d": "d.png",
        "e": None,
        "two.dots": "two.dots.png",
        "folder": None,
    }
    assert [(first.name, second.name) for first, second in masks.ambiguous] == [("d.png", "d.jpg")]
    assert set(masks.stems(video=True)) == {"a", "b", "c", "d", "clip", "folder", "two.dots"}
    assert masks.find("clip", video=True) == tmp_path / "clip", "frames before the lossy video before a still"
    (tmp_path / "clip").rmdir()
    assert MaskDirectory(tmp_path).find("clip", video=True) == tmp_path / "clip.mp4"
    assert MaskDirectory(tmp_path).find("clip", video=False) == tmp_path / "clip.png"
    with pytest.raises(UserError, match=r"mask_directory .* cannot be read"):
        MaskDirectory(tmp_path / "no")


@pytest.mark.parametrize(
    ("first", "second", "differs"),
    [
        ((1000, 750), (1000, 750), False),
        ((1000, 750), (500, 375), False),
        ((1000, 750), (1000, 743), False),
        ((1000, 750), (1000, 742), True),
        ((1000, 750), (742, 1000), True),
        ((1000, 985), (64, 63), False),  # the half-pixel of a small copy
        ((1000, 985), (640, 623), True),
        ((1, 1), (160, 120), True),
        ((20000, 1), (160, 120), True),
    ],
)
def test_one_percent_of_aspect_ratio(first, second, differs):
    assert aspect_differs(first, second) is differs
    assert aspect_differs(second, first) is differs


def test_a_default_mask_is_stretched_to_any_shape():
    mask = np.full((10, 10), 77, np.uint8)
    assert align_to_picture(mask, (40, 7), Path("m"), Path("p"), shared=True).shape == (7, 40)
    with pytest.raises(UserError, match=r"m\.png is 10x10 but p\.png is 40x7"):
        align_to_picture(mask, (40, 7), Path("m.png"), Path("p.png"))


def frames_in(folder, names):
    folder.mkdir()
    for name in names:
        Image.new("L", (3, 2), int("0" + "".join(filter(str.isdigit, name)))).save(folder / name)
    return folder


def test_frames_of_a_mask_come_in_the_order_of_their_numbers(tmp_path):
    masks = frames_in(tmp_path / "m", ["2.png", "10.png", "1.png", "11.png"])
    (masks / "notes.txt").touch()
    (masks / "._1.png").touch()  # what macOS leaves on foreign disks
    assert [path.name for path in frame_files(masks)] == ["1.png", "10.png", "11.png", "2.png"], "as the trainer lists"
    assert [path.name for path in mask_frame_files(masks)] == ["1.png", "2.png", "10.png", "11.png"]
    assert [int(frame[0, 0]) for frame in read_frames(masks)] == [1, 2, 10, 11]
    assert list(read_frames(masks, alpha=True)) == []
    same = frames_in(tmp_path / "same", ["2.png", "10.png", "1.png", "11.png"])
    assert [path.name for path in mask_frame_files(masks, same)] == ["1.png", "10.png", "11.png", "2.png"], (
        "the trainer reads this clip so, and its mask has to follow"
    )
    (masks / "2.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2\.png is empty"):
        list(read_frames(masks))


def test_missing_and_double_frames_are_named(tmp_path):
    clip = frames_in(tmp_path / "clip", [f"{t:02d}.png" for t in range(5)])
    sparse = frames_in(tmp_path / "a", ["f_0.png", "f_1.png", "f_2.png", "f_5.png"])
    with pytest.raises(UserError, match=r"a has no frame 3, between f_2\.png and f_5\.png"):
        mask_frame_files(sparse, clip)
    Image.new("L", (3, 2)).save(sparse / "f_9.png")
    assert len(mask_frame_files(sparse, clip)) == 5, "one for each frame of the clip, counted in another way"
    with pytest.raises(
        UserError, match=r"b has two frames 1, 1\.png and 01\.png|b has two frames 1, 01\.png and 1\.png"
    ):
        mask_frame_files(frames_in(tmp_path / "b", ["0.png", "1.png", "01.png"]), clip)


def test_video_masks_are_black_and_white_where_they_were(tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "m.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for t in range(5):
            frame = np.zeros((48, 64, 3), np.uint8)
            frame[:, 8 * t : 8 * t + 16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    frames = list(read_frames(path))
    assert len(frames) == 5
    for t, frame in enumerate(frames):
        assert frame.dtype == np.uint8
        assert frame[:, 8 * t + 2 : 8 * t + 14].min() >= 250
        assert np.delete(frame, np.s_[max(0, 8 * t - 2) : 8 * t + 18], axis=1).max() <= 5
    for content in (b"", b"no video", path.read_bytes()[:300]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"m\.mp4 cannot be decoded as a video"):
            list(read_frames(path))


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "error"),
    [("a.mov", "png", "rgba", 0), ("a.webm", "libvpx-vp9", "yuva420p", 0), ("a.webm", "libvpx", "yuva420p", 0.1)],
)
def test_a_video_with_alpha_gives_its_alpha(tmp_path, name, codec, pixels, error):
    av = pytest.importorskip("av")
    path = tmp_path / name
    alpha = np.zeros((48, 64), np.uint8)
    alpha[10:30, 20:50] = 255
    rgba = np.dstack([np.full((48, 64, 3), 90, np.uint8), alpha])
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.options = {"auto-alt-ref": "0", "crf": "5"} if codec != "png" else {}
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pixels)))
        container.mux(stream.encode())
    assert has_alpha_frames(path)
    frames = list(read_frames(path, alpha=True))
    assert len(frames) == 3
    assert all(np.abs(frame.astype(int) - alpha).mean() <= error for frame in frames)
    path = tmp_path / "opaque.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgba[..., :3], format="rgb24")))
        container.mux(stream.encode())
    assert not has_alpha_frames(path)


def test_frames_are_counted_where_the_container_does_not_say(tmp_path):
    """In VP8 some are for reference alone, and never shown: their first byte says so."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "x.webm"), "w") as container:
        stream = container.add_stream("libvpx", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        frames = (np.random.default_rng(t).integers(0, 256, (64, 64, 3), np.uint8) for t in range(9))
        packets = [stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")) for frame in frames]
        for index, packet in enumerate([one for few in [*packets, stream.encode()] for one in few]):
            data = bytearray(bytes(packet))
            data[0] &= 0xEF if index == 4 else 0xFF
            copy = av.Packet(bytes(data))
            copy.stream, copy.time_base = stream, packet.time_base
            copy.pts, copy.dts, copy.is_keyframe = packet.pts, packet.dts, packet.is_keyframe
            container.mux(copy)
    assert sum(1 for _ in read_frames(tmp_path / "x.webm")) == 8
    assert clip_frame_count(tmp_path / "x.webm") == 8


def test_kept_frames_stop_and_go_on():
    import itertools

    assert list(itertools.islice(kept_frames(None, 32.0, 16.0), 4)) == [0, 2, 4, 6]
    assert list(kept_frames(0, 32.0, 16.0)) == []


def test_a_picture_takes_its_alpha_channel_then_its_file_then_full_weight(tmp_path):
    """A channel that is opaque everywhere says nothing about the subject: screenshots often have one."""
    alpha = np.full((8, 9), 255, np.uint8)
    rgb = np.zeros((8, 9, 3), np.uint8)
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "opaque.png")
    alpha[:4] = 0
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "cut.png")
    Image.fromarray(np.full((8, 9), 51, np.uint8)).save(tmp_path / "mask.png")
    cut, opaque = (Candidate("alpha", tmp_path / name) for name in ("cut.png", "opaque.png"))
    file = Candidate("file", tmp_path / "mask.png")
    values, found = read_still([cut, file])
    assert found == cut
    assert np.array_equal(values, alpha)
    values, found = read_still([opaque, file])
    assert found == file
    assert (values == 51).all()
    assert read_still([opaque]) == (None, None)
