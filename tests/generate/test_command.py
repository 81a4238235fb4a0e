"""The command on folders of pictures: names, orientation, resuming, problems, the summary, and what it costs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageOps

from masked_loss_triton.files.locks import folder_lock
from masked_loss_triton.generate import grabcut
from tests.generate.support import contents, generate, save, subject, words, write_clip


def iou(first, second):
    return (first & second).sum() / (first | second).sum()


@pytest.mark.parametrize(
    "extension", ["png", "jpg", "JPEG", "webp", "bmp", "tif", "tiff", "gif", "tga", "ppm", "jp2", "avif"]
)
def test_every_format_gets_a_lossless_png_beside_its_sub_folder(folder, extension):
    if extension == "avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    mask = save(folder / "in" / "a" / "b.c" / f"x.y.{extension}")
    assert generate(folder) == 0
    (name,) = contents(folder / "out")
    assert name == "a/b.c/x.y.png"
    image = Image.open(folder / "out" / name)
    assert (image.format, image.mode, image.size) == ("PNG", "L", (96, 64))
    assert set(np.unique(np.array(image))) == {0, 255}
    assert iou(np.array(image) > 0, mask) > 0.9


def test_masks_of_a_label_stand_beside_the_plain_ones(folder, capsys):
    save(folder / "in" / "a.png")
    write_clip(folder / "in" / "c.mp4", [subject(0)[0]] * 3)
    assert generate(folder) == generate(folder, "--label", "face") == 0
    stems = {name.split("/")[0].removesuffix(".png") for name in contents(folder / "out")}
    assert stems == {"a", "a.face", "c", "c.face"}
    capsys.readouterr()
    assert generate(folder, "--label", "face") == 0
    assert "2 already there" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        generate(folder, "--label", "fa/ce")
    assert "a label is made of letters" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_lies_on_the_stored_pixels_and_turns_with_the_picture(folder, orientation):
    upright, _ = subject(3)
    turn = {2: 0, 3: 1, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # any turn will do: what is stored is what EXIF undoes
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(upright)
    if orientation != 1:
        stored = stored.transpose(Image.Transpose(turn[orientation]))
    stored.save(folder / "in" / "x.png", exif=exif)
    assert generate(folder) == 0
    mask = Image.open(folder / "out" / "x.png")
    assert mask.size == stored.size
    bright = np.array(stored)[..., 0] > 128
    assert iou(np.array(mask) > 0, bright) > 0.9
    # A program that turns pictures upright turns the mask with its picture.
    both = [np.array(ImageOps.exif_transpose(Image.open(folder / name / "x.png"))) for name in ("in", "out")]
    assert iou(both[1] > 0, both[0][..., 0] > 128) > 0.9


def test_what_is_there_is_kept_and_overwrite_makes_it_again(folder, capsys):
    for seed in range(3):
        save(folder / "in" / f"p{seed}.png", seed)
    (folder / "out").mkdir()
    Image.new("L", (96, 64), 77).save(folder / "out" / "p1.webp", lossless=True)
    by_hand = (folder / "out" / "p1.webp").read_bytes()
    assert generate(folder) == 0
    assert "2 masks written, 1 already there" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()}
    assert sorted(path.name for path in before) == ["p0.png", "p1.webp", "p2.png"]
    assert generate(folder, "--mask_dilate", "2") == 0
    said = capsys.readouterr().out
    assert "0 masks written, 3 already there" in said
    assert "2 of those already there were made with other settings" in said
    assert {path: path.stat().st_mtime_ns for path in (folder / "out").iterdir()} == before
    assert generate(folder, "--mask_dilate", "2", "--overwrite") == 0
    assert "2 masks written, 1 already there, 0 without" in capsys.readouterr().out
    assert (folder / "out" / "p1.webp").read_bytes() == by_hand
    assert generate(folder, "--mask_dilate", "2") == 0
    assert "other settings" not in capsys.readouterr().out


def test_problems_are_told_and_the_others_are_done(folder, capsys):
    save(folder / "in" / "good.png")
    (folder / "in" / "broken.png").write_bytes((folder / "in" / "good.png").read_bytes()[:500])
    (folder / "in" / "empty.jpg").write_bytes(b"")
    (folder / "in" / "bad.mp4").write_bytes(b"no video")
    save(folder / "in" / "good.bmp")
    save(folder / "in" / "walk" / "0.png")
    write_clip(folder / "in" / "walk.mp4", [subject(0)[0]] * 2)
    assert generate(folder) == 1
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    for text in (
        "broken.png",
        "empty.jpg is empty",
        "bad.mp4",
        "good.png has the same stem as good.bmp",
        "walk.mp4: its fr",
    ):
        assert sum(text in line for line in lines) == 1, text
    assert "2 masks written, 0 without a detection, 5 problems" in said.out
    assert sorted(contents(folder / "out")) == ["good.png", "walk/0.png"]


def test_an_unexpected_error_is_a_problem_of_its_picture(folder, capsys, monkeypatch):
    for seed in range(5):
        save(folder / "in" / f"p{seed}.png", seed)
    real = grabcut.cut_out_box
    bad = subject(2)[0]

    def sometimes(picture, box):
        if np.array_equal(picture, bad):
            raise RuntimeError("CUDA out of memory")
        return real(picture, box)

    monkeypatch.setattr(grabcut, "cut_out_box", sometimes)
    assert generate(folder, "--batch_size", "3") == 1
    said = capsys.readouterr()
    assert "4 masks written, 0 without a detection, 1 problems" in said.out
    assert "p2.png: RuntimeError: CUDA out of memory (--debug shows where)" in said.err
    assert sorted(contents(folder / "out")) == ["p0.png", "p1.png", "p3.png", "p4.png"]


def test_nothing_of_the_wanted_size_is_listed(folder, capsys):
    save(folder / "in" / "a.png")
    assert generate(folder, "--min_size", "0.9") == 0
    assert f"Nothing found: {folder / 'in' / 'a.png'}" in capsys.readouterr().out
    assert not contents(folder / "out")
    assert generate(folder, "--min_size", "0.9", "--strict") == 1
    assert generate(folder, "--min_size", "0.9", "--no_detection", "white") == 0
    assert np.array(Image.open(folder / "out" / "a.png")).min() == 255


def test_a_mask_says_what_it_was_made_with(folder):
    save(folder / "in" / "a.png")
    assert generate(folder, "--reference_box", "0.1", "0.2", "0.9", "0.8", "--invert") == 0
    image = Image.open(folder / "out" / "a.png")
    assert set(np.unique(np.array(image))) == {0, 255}
    note = json.loads(image.info["masked_loss_triton"])
    assert note["backend"] == "grabcut"
    assert note["invert"]
    # Nobody detected anything, and GrabCut does not judge itself.
    assert note["found"] == [{"words": "the box", "box": [10, 13, 86, 51], "score": None, "mask_score": None}]
    assert not any(str(folder) in str(value) for value in note.values())


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--text_prompt", "cat"], "--backend grabcut reads no words, it masks the box: leave out --text_prompt"),
        (["--exclude_prompt", "a"], "leave out --exclude_prompt"),
        (["--backend", "u2net", "--text_prompt", "cat"], "u2net reads no words, it masks what stands out"),
        (["--batch_size", "0"], "--batch_size must be 1 or more"),
        (["--backend", "yolo"], "--backend yolo: write DETECTOR+SEGMENTER"),
        (["--backend", "florence2+sam2"], "say what to look for"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, flags, text):
    from masked_loss_triton.cli import main

    paths = ["--images", str(folder / "in"), "--masks", str(folder / "out")]
    assert main(["generate", *paths, "--backend", "grabcut", *flags]) == 2
    assert text in capsys.readouterr().err


def test_bad_folders_are_one_line(folder, capsys):
    assert generate(folder) == 2
    assert "has no pictures or clips in it" in capsys.readouterr().err
    assert generate(folder, source="nowhere") == 2
    assert "nowhere is not a folder" in capsys.readouterr().err
    assert generate(folder, out="in") == 2
    assert "must be two folders" in capsys.readouterr().err


def test_masks_and_sheets_among_the_pictures_are_no_pictures(folder, capsys):
    save(folder / "in" / "a.png")
    for _ in range(2):
        assert generate(folder, "--sheet_limit", "4", out="in/masks") == 0
        assert sorted(contents(folder)) == ["in/a.png", "in/masks/a.png", "in_masks_sheet.html", "in_masks_sheet.png"]
    # A second folder of masks, and a sheet that was moved.
    (folder / "in_masks_sheet.png").rename(folder / "in" / "sheet.png")
    capsys.readouterr()
    assert generate(folder, out="in/more") == 0
    assert sorted(contents(folder / "in" / "more")) == ["a.png"]
    assert "2 masks and contact sheets of earlier runs among the pictures: passed over" in capsys.readouterr().out
    for place in ("in/look", "out/look"):
        assert generate(folder, "--sheet_limit", "4", "--sheet", folder / place) == 2
        assert "would be read as a picture or mask" in capsys.readouterr().err


def test_names_reach_terminal_and_page_as_text(folder, capsys):
    name = "<img src=x>\x1b[31m\u202e\nb&.png"
    (folder / "<b>in").mkdir()
    save(folder / "<b>in" / name)
    (folder / "<b>in" / f"bad{name}").write_bytes(b"x")
    assert generate(folder, "--sheet_limit", "4", "--sheet", folder / "look", source="<b>in") == 1
    said = capsys.readouterr()
    assert "<img src=x>\\x1b[31m\\u202e\\nb&.png is not a picture" in said.err
    assert not set(said.out + said.err) & {"\x1b", "\u202e"}
    page = (folder / "look.html").read_text()
    assert page.count("<img") == 1
    assert "<b>" not in page
    assert "&lt;img src=x&gt;" in page


def test_names_may_be_as_long_as_the_file_system_takes(folder):
    for number, stem in enumerate(("a" * 251, "\u65e5" * 83)):
        save(folder / "in" / f"{stem}.png", number)
    write_clip(folder / "in" / f"{'c' * 251}.mp4", [subject(0)[0]] * 2)
    for flags in ((), (), ("--overwrite",)):
        assert generate(folder, *flags) == 0
        assert len(contents(folder / "out")) == 4


@pytest.mark.parametrize("kind", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame_is_masked_and_it_says_so(folder, capsys, kind):
    frames = [Image.fromarray(subject(seed)[0]) for seed in range(3)]
    frames[0].save(folder / "in" / f"moving.{kind}", save_all=True, append_images=frames[1:], duration=100)
    frames[0].save(folder / "in" / f"still.{'bmp' if kind == 'gif' else kind}")
    assert generate(folder) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "it is an animation: only its first frame is masked" in line]
    assert f"moving.{kind}" in line
    assert generate(folder, "--strict") == 1, "a run that finds it there says it again"


def test_pictures_of_kinds_that_are_not_read_are_counted(folder, capsys):
    for name in ("a.HEIC", "b.heic", "c.dng", "d.txt"):
        (folder / "in" / name).write_bytes(b"x")
    assert generate(folder) == 2
    assert "has no pictures or clips in it (1 .dng, 2 .heic: not read here" in capsys.readouterr().err
    assert not (folder / "out").exists()
    save(folder / "in" / "e.png")
    assert generate(folder) == 0
    assert "Skipped: 1 .dng, 2 .heic: not read here nor by the trainers; convert them" in capsys.readouterr().out


def test_folders_that_cannot_be_written_are_told_before_the_work_and_never_cost_the_summary(folder, capsys):
    save(folder / "in" / "a.png")
    (folder / "file").write_text("x")
    # With a backend whose weights are absent: they would be asked for next.
    assert generate(folder, "--backend", "florence2+sam2", "--text_prompt", "a", out="file/out") == 2
    assert f"--masks {folder / 'file' / 'out'} cannot be written (Not a directory)" in capsys.readouterr().err
    assert generate(folder, "--sheet_limit", "4", "--sheet", folder / "file" / "look") == 1
    said = capsys.readouterr()
    assert "look.png cannot be written (" in said.err
    assert "1 masks written, 0 without a detection, 1 problems" in said.out


def test_two_runs_on_one_folder_take_turns(folder, capsys):
    save(folder / "in" / "a.png")
    (folder / "out").mkdir()
    with contextlib.ExitStack() as release:
        release.enter_context(folder_lock(folder / "out", "another run"))
        command = [sys.executable, "-m", "masked_loss_triton", *words(folder)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert "waits for another run" in process.stderr.readline()
            assert not list((folder / "out").glob("*.png"))
            save(folder / "out" / "a.png")  # what the other run has written until then is there already
            by_hand = (folder / "out" / "a.png").read_bytes()
            release.close()
            assert "0 masks written, 1 already there" in process.stdout.read()
    assert process.returncode == 0
    assert (folder / "out" / "a.png").read_bytes() == by_hand


def test_large_pictures_are_no_matter_of_warnings(folder, capsys, monkeypatch):
    save(folder / "in" / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 96 * 64 - 1)
    assert generate(folder) == 0
    assert "Decompression" not in capsys.readouterr().err


def test_the_contact_sheet_shows_everything(folder, capsys):
    for seed in range(3):
        save(folder / "in" / f"p{seed}.png", seed)
    write_clip(folder / "in" / "clip.mp4", [subject(s)[0] for s in range(4)])
    assert generate(folder, "--sheet_limit", "3", "--sheet", folder / "look" / "here") == 0
    assert "show 3 of 4" in capsys.readouterr().out
    page = (folder / "look" / "here.html").read_text()
    assert page.count("<img") == 3
    assert "nothing was looked for: cut out of the box that was given" in page
    assert "found:" not in page
    with Image.open(folder / "look" / "here.png") as sheet:
        assert sheet.size[0] > 500
    assert "sheet" not in " ".join(contents(folder / "out"))
