"""`masked-loss captions`: copies whose captions name other places, beside the pictures and masks as they were."""

import collections
import re

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.cli import main
from masked_loss_triton.masks.variants import Variation, new_captions

PLACES = ("in a meadow", "at sunset", "on a street", "under stars", "by the sea")


@pytest.fixture
def photos(tmp_path):
    random = np.random.default_rng(0)
    for name in ("photos/a.jpg", "photos/b.png", "photos/deep/c.png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(file)
        file.with_suffix(".txt").write_text(f"ohwx {file.stem}\n")
        mask = tmp_path / "masks" / file.relative_to(tmp_path / "photos").with_suffix(".png")
        mask.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((24, 32), 200, np.uint8)).save(mask)
    (tmp_path / "photos/b.txt").write_text("ohwx {place}, smiling.")
    return tmp_path


def run(folder, *flags, places=PLACES):
    command = ["captions", "--images", str(folder / "photos"), "--output", str(folder / "varied")]
    return main([*command, "--places", *places, *flags])


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_each_copy_says_another_place_and_is_the_picture_and_the_mask_byte_for_byte(photos, capsys):
    before = contents(photos)
    assert run(photos, "--masks", str(photos / "masks"), "--variants", "3") == 0
    assert "3 pictures copied" in capsys.readouterr().out
    new = contents(photos / "varied")
    assert {name: value for name, value in contents(photos).items() if not name.startswith("varied")} == before
    for stem, picture in (("a", "a.jpg"), ("b", "b.png"), ("deep/c", "deep/c.png")):
        captions = []
        for number in (1, 2, 3):
            copy = f"images/{stem}_{number}"
            assert new.pop(copy + picture[picture.index(".") :]) == before[f"photos/{picture}"]
            assert new.pop(f"masks/{stem}_{number}.png") == before[f"masks/{stem}.png"]
            captions.append(new.pop(f"{copy}.txt").decode())
        places = [place for caption in captions for place in PLACES if place in caption]
        assert len(set(places)) == 3
        if stem == "b":
            assert captions == [f"ohwx {place}, smiling.\n" for place in places]
        else:
            assert captions == [f"ohwx {stem[-1]}, {place}\n" for place in places]
    assert not new


def test_places_are_used_evenly_and_depend_on_the_name_alone(tmp_path):
    variation = Variation(images=tmp_path, masks=None, output=tmp_path / "out", places=PLACES, variants=2)
    used = collections.Counter(
        caption for i in range(500) for caption in new_captions("x", tmp_path / f"{i}.png", variation)
    )
    assert len(used) == len(PLACES)
    assert max(used.values()) < 1.3 * min(used.values())


def test_a_second_run_writes_nothing_and_what_was_edited_is_kept(photos, capsys):
    assert run(photos) == 0
    written = contents(photos / "varied")
    assert run(photos) == 0
    assert "0 pictures copied" in capsys.readouterr().out
    edited = photos / "varied" / "images" / "a_1.txt"
    edited.write_text("my own words")
    (photos / "varied" / "images" / "b_2.png").unlink()
    assert run(photos) == 1
    assert re.search(r"a_1\.txt is already there, with other contents: move it", capsys.readouterr().err)
    assert contents(photos / "varied") == written | {"images/a_1.txt": b"my own words"}


def test_masks_of_labels_go_along(photos):
    for name in ("a.face.png", "a.body.png"):
        Image.fromarray(np.full((24, 32), 90, np.uint8)).save(photos / "masks" / name)
    assert run(photos, "--masks", str(photos / "masks"), "--variants", "2") == 0
    names = sorted(file.name for file in (photos / "varied/masks").glob("a_1*"))
    assert names == ["a_1.body.png", "a_1.face.png", "a_1.png"]


def test_places_from_a_file_and_a_caption_for_pictures_without(photos):
    (photos / "photos/a.txt").unlink()
    (photos / "places.txt").write_text("in a meadow\n\n  at   sunset\n")
    assert run(photos, "--caption", "ohwx dog", places=[str(photos / "places.txt")]) == 0
    texts = {(photos / f"varied/images/a_{number}.txt").read_text() for number in (1, 2)}
    assert texts == {"ohwx dog, in a meadow\n", "ohwx dog, at sunset\n"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "photos/a.txt").unlink(), "a.jpg has no caption a.txt: add one, or give --caption"),
        (lambda folder: (folder / "photos/a.txt").write_text(" \n"), "a.txt is empty"),
        (lambda folder: (folder / "photos/a.txt").write_bytes(b"\xff\xfe\xff"), "a.txt is not UTF-8 text"),
        (lambda folder: (folder / "masks/a.png").unlink(), "a.jpg has no mask in"),
    ],
)
def test_an_odd_picture_is_one_line_and_the_rest_is_done(photos, capsys, change, words):
    change(photos)
    assert run(photos, "--masks", str(photos / "masks")) == 1
    output = capsys.readouterr()
    assert words in output.err
    assert "2 pictures copied" in output.out
    assert not list((photos / "varied/images").glob("a_*"))


@pytest.mark.parametrize(
    ("flags", "places", "words"),
    [
        ((), ("in a meadow",), "--places must be two places or more"),
        ((), ("at sea", "at  sea"), "--places has 'at sea' twice"),
        (("--variants", "6"), PLACES, "--variants must be between 1 and 5"),
        (("--variants", "0"), PLACES, "--variants must be 1 or more"),
        (("--captions", "/"), PLACES, "is not an extension"),
        (("--masks", "nowhere"), PLACES, "--masks nowhere is not a folder"),
    ],
)
def test_a_wrong_flag_is_one_line(photos, capsys, flags, places, words):
    assert run(photos, *flags, places=places) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert not (photos / "varied").exists()


def test_a_picture_whose_name_looks_like_anothers_label_keeps_its_mask(photos):
    """a.b.png is the mask of the picture a.b, and no label of a."""
    for folder, name in (("photos", "a.b.png"), ("masks", "a.b.png")):
        Image.fromarray(np.full((24, 32), 50, np.uint8)).save(photos / folder / name)
    (photos / "photos/a.b.txt").write_text("another")
    assert run(photos, "--masks", str(photos / "masks"), "--variants", "2") == 0
    names = sorted(file.name for file in (photos / "varied/masks").glob("a*"))
    assert names == ["a.b_1.png", "a.b_2.png", "a_1.png", "a_2.png"]
