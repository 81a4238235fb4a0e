"""What is saved is what `cache` reads, and nothing that a person made is lost: the cases that a reviewer broke it with."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.cache.dataset import load_datasets
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.inject import prepare
from masked_loss_triton.edit.clicks import Selector
from masked_loss_triton.edit.entries import entries_of_dataset, entries_of_folders
from masked_loss_triton.edit.library import Library
from masked_loss_triton.edit.survey import Survey
from masked_loss_triton.edit.tasks import Task, carry
from masked_loss_triton.errors import UserError
from tests.cache.support import Lab, frames_of, video_lab

SIZE = (64, 48)


def grey(value: int, size=SIZE) -> np.ndarray:
    return np.full(size[::-1], value, np.uint8)


def write(path, value):
    Image.fromarray(grey(value)).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))


def value(path) -> int:
    with Image.open(path) as image:
        return int(np.asarray(image.convert("L"))[0, 0])


@pytest.fixture
def lab(tmp_path):
    lab = Lab(tmp_path)
    for name in "ab":
        lab.picture(name, size=SIZE)
    return lab


def library_of(lab) -> Library:
    return Library(entries_of_folders(lab.images, lab.masks, (64, 64), FAMILIES["wan"])[0])


def library_of_list(lab, lines) -> Library:
    (lab.folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lab.toml.write_text(
        f'[[datasets]]\nresolution = [64, 64]\nimage_jsonl_file = "{lab.folder / "list.jsonl"}"\n'
        f'cache_directory = "{lab.cache}"\nmask_directory = "{lab.masks}"\n'
    )
    return Library(entries_of_dataset(prepare(load_datasets(lab.toml)[0], FAMILIES["wan"])))


def test_a_mask_that_a_list_names_is_changed_where_it_stands_or_not_at_all(lab):
    own = lab.folder / "own"
    own.mkdir()
    write(own / "a.webp", 50)
    write(own / "b.png", 60)
    lines = [
        {"image_path": str(lab.images / f"{n}.png"), "mask_path": str(own / m)}
        for n, m in (["a", "a.webp"], ["b", "b.png"])
    ]
    library = library_of_list(lab, lines)
    with pytest.raises(UserError, match=r"a\.webp is named by a list"):
        library.save(library.entries[0], grey(9), None)
    assert value(own / "a.webp") == 50
    library.save(library.entries[1], grey(9), None)
    assert value(own / "b.png") == 9


def test_a_mask_of_two_pictures_is_not_changed_for_one(lab):
    write(lab.masks / "both.png", 50)
    lines = [{"image_path": str(lab.images / f"{n}.png"), "mask_path": str(lab.masks / "both.png")} for n in "ab"]
    library = library_of_list(lab, lines)
    with pytest.raises(UserError, match="several pictures"):
        library.save(library.entries[0], grey(9), None)
    assert value(lab.masks / "both.png") == 50


def test_links_and_protected_files_are_left_alone(lab):
    write(lab.folder / "store.png", 50)
    (lab.masks / "a.png").symlink_to(lab.folder / "store.png")
    write(lab.masks / "b.webp", 60)
    (lab.masks / "b.webp").chmod(0o444)
    library = library_of(lab)
    for entry, text in zip(library.entries, ("is a link", "read-only"), strict=True):
        with pytest.raises(UserError, match=text):
            library.save(entry, grey(9), None)
    assert value(lab.folder / "store.png") == 50
    assert (lab.masks / "a.png").is_symlink()
    assert value(lab.masks / "b.webp") == 60


def test_an_alpha_channel_that_is_read_first_is_told_of(lab):
    alpha = grey(255)
    alpha[:10] = 0
    lab.picture("a", size=SIZE, alpha=alpha)
    lab.write_toml(entry=f'alpha_mask = true\nmask_directory = "{lab.masks}"')
    library = Library(entries_of_dataset(prepare(load_datasets(lab.toml)[0], FAMILIES["wan"])))
    with pytest.raises(UserError, match="alpha channel"):
        library.save(library.entries[0], grey(9), None)
    library.save(library.entries[1], grey(9), None)
    assert os.listdir(lab.masks) == ["b.png"] or set(os.listdir(lab.masks)) == {"b.png", ".replaced-masks"}


def test_the_first_copy_stays_and_what_is_reverted_is_kept(lab):
    write(lab.masks / "a.webp", 50)
    library = library_of(lab)
    library.save(library.entries[0], grey(9), None)
    write(lab.masks / "a.webp", 200)  # somebody puts another one there
    library.save(library.entries[0], grey(10), None)
    write(lab.masks / "a.png", 77)  # and changes the saved one
    assert library.revert(library.entries[0])
    assert value(lab.masks / "a.webp") == 50
    assert not (lab.masks / "a.png").exists()
    kept = {value(path) for path in (lab.masks / ".replaced-masks").rglob("*.*") if path.suffix in (".png", ".webp")}
    assert {200, 77} <= kept


def test_carrying_stops_before_a_frame_that_was_drawn(tmp_path):
    lab = video_lab(tmp_path, frames_of(9))
    library = Library(entries_of_folders(lab.images, lab.masks, (128, 128), FAMILIES["wan"])[0])
    entry, size = library.entries[0], (128, 128)
    library.save(entry, grey(255, size), None, 0)
    library.save(entry, grey(111, size), None, 4)
    selector = Selector(str(tmp_path / "absent"), str(tmp_path / "absent.onnx"), "cpu")
    text = carry(library, entry, selector, 0, 8, lambda: None)(Task())
    assert "frames 1 to 3; frame 4 was drawn, and stays" in text
    assert library.mask(entry, 4).pixels.max() == 111
    assert library.mask(entry, 3).pixels.max() == 255
    assert library.mask(entry, 5).pixels.max() == 0
    with pytest.raises(UserError, match="frame 4 was drawn"):
        carry(library, entry, selector, 3, 5, lambda: None)(Task())


def test_two_editors_keep_each_others_marks(lab):
    first, second = (Survey(library_of(lab), lab.masks) for _ in range(2))
    first.review(0, "ok")
    second.review(1, "fix")
    assert first.since(0)["facts"] == {}, "nothing is known of an entry that was not looked at yet"
    assert Survey(library_of(lab), lab.masks).reviewed == {"a.png": "ok", "b.png": "fix"}
