"""What a person made is never replaced or deleted unasked, whatever its name and format; when it is asked for, a copy stays."""

from __future__ import annotations

import shutil

import av
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from masked_loss_triton.generate import mask_files
from masked_loss_triton.generate.mask_files import is_generated
from masked_loss_triton.masks.frames import read_frames
from tests.generate.support import contents, generate, subject, write_clip

NOTHING_FOUND = ("--min_size", "0.9")
KIND = "Kept, not made by generate: "


@pytest.fixture
def folder(tmp_path):
    """A picture p.png and a clip v.mp4 in `in`, and an empty folder `out`."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    Image.fromarray(subject(0)[0]).save(tmp_path / "in" / "p.png")
    write_clip(tmp_path / "in" / "v.mp4", [subject(seed)[0] for seed in range(4)])
    return tmp_path


def drawn(name):
    return lambda out: Image.new("L", (96, 64), 77).save(out / name)


def retouched(name):
    """A generated PNG that a program has changed and saved with its note."""

    def make(out):
        generate(out.parent)
        path = next(out.glob(name))
        with Image.open(path) as image:
            note = PngImagePlugin.PngInfo()
            note.add_text("masked_loss_triton", image.info["masked_loss_triton"])
            image.load()
            image.putpixel((3, 3), 200)
            image.save(path, pnginfo=note)

    return make


def film(name):
    return lambda out: write_clip(out / name, [np.full((64, 96, 3), 40 * t, np.uint8) for t in range(4)])


def copied_film(out):
    """A generated video through another program, which keeps the note in its container."""
    generate(out.parent, "--clip_output", "video")
    shutil.move(out / "v.mkv", out.parent / "v.mkv")
    with av.open(str(out.parent / "v.mkv")) as source, av.open(str(out / "v.mkv"), "w") as target:
        target.metadata.update(source.metadata)
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)


def beside_the_frames(name):
    def make(out):
        generate(out.parent)
        (out / "v" / name).parent.mkdir(exist_ok=True)
        (out / "v" / name).write_text("loss 0.1")

    return make


PICTURES = {
    "png": drawn("p.png"),
    "capitals": drawn("p.JPG"),
    "mixed": drawn("p.WebP"),
    "tiff": drawn("p.tiff"),
    "retouched": retouched("p.png"),
}
CLIPS = {
    "still": drawn("v.png"),
    "still in capitals": drawn("v.JPG"),
    "video": film("v.mkv"),
    "video in capitals": film("v.MP4"),
    "video with our note": copied_film,
    "one frame": retouched("v/000002.png"),
    "notes": beside_the_frames("train.log"),
    "sub-folder": beside_the_frames("old/000000.txt"),
}
MADE_BY_HAND = [*(("p", make) for make in PICTURES.values()), *(("v", make) for make in CLIPS.values())]
NAMES = [*PICTURES, *CLIPS]


def of(files, stem):
    return {name: data for name, data in files.items() if name.replace("/", ".").startswith(f"{stem}.")}


@pytest.mark.parametrize(("stem", "make"), MADE_BY_HAND, ids=NAMES)
def test_what_a_person_made_stays(folder, capsys, stem, make):
    make(folder / "out")
    before = of(contents(folder / "out"), stem)
    assert before
    forms = ("frames", "video") if stem == "v" else ("frames",)
    for flags in ((), ("--overwrite",), ("--overwrite", "generated", *NOTHING_FOUND)):
        for form in forms:
            capsys.readouterr()
            assert generate(folder, *flags, "--clip_output", form) == 0
            assert of(contents(folder / "out"), stem) == before
            said = capsys.readouterr().out
            assert said.count(KIND) == (1 if flags else 0), said
            assert "already there" in said


@pytest.mark.parametrize("flags", [(), NOTHING_FOUND], ids=["found", "nothing found"])
@pytest.mark.parametrize(("stem", "make"), MADE_BY_HAND, ids=NAMES)
def test_when_asked_by_name_it_is_replaced_and_a_copy_kept(folder, capsys, stem, make, flags):
    make(folder / "out")
    before = of(contents(folder / "out"), stem)
    capsys.readouterr()
    assert generate(folder, "--overwrite", "drawn", *flags) == 0
    (place,) = (folder / "out" / ".replaced-masks").iterdir()
    assert f"copies in {place}" in capsys.readouterr().out
    assert contents(place) == before
    after = {name: data for name, data in contents(folder / "out").items() if not name.startswith(".")}
    wanted = {"p": ["p.png"], "v": [f"v/{index:06d}.png" for index in range(4)]}[stem]
    assert sorted(of(after, stem)) == ([] if flags else wanted)
    if not flags:
        assert is_generated(folder / "out" / {"p": "p.png", "v": "v"}[stem])
    # What is read as a mask next time is the new one; the copies are nobody's mask.
    assert generate(folder) == 0


def test_what_generate_made_is_replaced_in_any_form(folder):
    assert generate(folder) == 0
    (folder / "out" / "v" / ".DS_Store").write_bytes(b"Finder was here")
    assert generate(folder, "--overwrite", "--clip_output", "video") == 0
    assert sorted(contents(folder / "out")) == ["p.png", "v.mkv"]
    assert is_generated(folder / "out" / "v.mkv")
    assert len(list(read_frames(folder / "out" / "v.mkv"))) == 4
    assert generate(folder, "--overwrite") == 0
    assert sorted(contents(folder / "out")) == ["p.png", *(f"v/{index:06d}.png" for index in range(4))]
    assert generate(folder, "--overwrite", *NOTHING_FOUND) == 0
    assert not contents(folder / "out")


def test_a_folder_of_that_name_without_masks_is_in_the_way_and_stays(folder, capsys):
    (folder / "out" / "v").mkdir()
    (folder / "out" / "v" / "notes.txt").write_text("precious")
    for flags in ((), ("--overwrite",), ("--overwrite", "drawn")):
        assert generate(folder, *flags, "--sheet_limit", "4") == 1
        said = capsys.readouterr()
        assert "v is in the way and is no mask" in said.err
        assert "1 problems" in said.out
        assert (folder / "out" / "v" / "notes.txt").read_text() == "precious"
    # As a video the mask has another name.
    assert generate(folder, "--clip_output", "video") == 0
    assert (folder / "out" / "v" / "notes.txt").read_text() == "precious"
    assert is_generated(folder / "out" / "v.mkv")


def test_a_picture_and_a_clip_of_one_stem_have_a_mask_each(folder):
    shutil.copy(folder / "in" / "p.png", folder / "in" / "v.png")
    assert generate(folder) == 0
    assert sorted(contents(folder / "out")) == ["p.png", "v.png", *(f"v/{index:06d}.png" for index in range(4))]
    for path in (folder / "out" / "v").iterdir():
        path.unlink()
    assert generate(folder) == 0
    assert len(list((folder / "out" / "v").iterdir())) == 4


def test_a_mask_drawn_while_the_run_goes_on_stays(folder, monkeypatch):
    from masked_loss_triton.generate import grabcut

    real = grabcut.cut_out_box

    def slow(picture, box):
        drawn("p.png")(folder / "out")
        return real(picture, box)

    monkeypatch.setattr(grabcut, "cut_out_box", slow)
    (folder / "in" / "v.mp4").unlink()
    assert generate(folder) == 1
    assert np.array(Image.open(folder / "out" / "p.png")).max() == 77


VIDEO, AGAIN = ("--clip_output", "video"), ("--overwrite",)
MEANWHILE = "was written by another program meanwhile, and is left as it is"
# The mask, the flags, the function of mask_files after whose n-th call somebody saves it, and what is said.
LAST_MOMENTS = {
    "picture": ("p.png", (), "_save", 1, MEANWHILE),
    "picture again": ("p.png", AGAIN, "_save", 1, MEANWHILE),
    "picture without a detection": ("p.png", (*AGAIN, *NOTHING_FOUND), "temporary_folder", 1, MEANWHILE),
    "video": ("v.mkv", VIDEO, "_copy_and_seal", 1, MEANWHILE),
    "video again": ("v.mkv", (*VIDEO, *AGAIN), "_copy_and_seal", 1, MEANWHILE),
    "frames": ("v/000001.png", (), "is_mask", 2, "v cannot be written (Directory not empty)"),
    "frames again": ("v/000001.png", AGAIN, "temporary_folder", 2, MEANWHILE),
}


@pytest.mark.parametrize(("mask", "flags", "name", "call", "said"), LAST_MOMENTS.values(), ids=LAST_MOMENTS)
def test_a_mask_saved_at_the_very_last_moment_stays(folder, monkeypatch, capsys, mask, flags, name, call, said):
    """After the last look at the old mask, before the new one has its name."""
    (folder / "in" / ("v.mp4" if mask == "p.png" else "p.png")).unlink()
    if AGAIN[0] in flags:
        assert generate(folder, *(VIDEO if VIDEO[0] in flags else ())) == 0
    real, calls = getattr(mask_files, name), []

    def then_somebody_saves(*arguments):
        result = real(*arguments)
        calls.append(name)
        if len(calls) == call:
            (folder / "out" / mask).parent.mkdir(exist_ok=True)
            (folder / "out" / mask).write_bytes(b"by hand")
        return result

    monkeypatch.setattr(mask_files, name, then_somebody_saves)
    assert generate(folder, *flags) == 1
    assert said in capsys.readouterr().err
    left = contents(folder / "out")
    assert left[mask] == b"by hand"
    assert not any("masktmp" in path for path in left)
