"""Zooms: what each shows is what a loop over the pixels says, nothing of it is cut, and the command writes a crop for each."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from masked_loss_triton.cache.dataset import plain_dataset
from masked_loss_triton.cache.families import FAMILIES
from masked_loss_triton.cache.items import bucket_size, buckets_of
from masked_loss_triton.cli import main
from masked_loss_triton.masks.crops import crop_around, cut_share
from masked_loss_triton.masks.zooms import zoomed
from tests.masks.test_crops import RESOLUTIONS

PERSON, FACE, LOGO = (60, 20, 140, 280), (85, 30, 115, 70), (150, 250, 170, 270)


def box(shape, edges, value=255) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[edges[1] : edges[3], edges[0] : edges[2]] = value
    return mask


def random_masks(rng) -> dict[str, np.ndarray]:
    shape = tuple(int(side) for side in rng.integers(3, 25, 2))
    masks = {}
    for label in ("", "face", "body"):
        if rng.random() < 0.7 or label == "":
            x, y = rng.integers(0, shape[1]), rng.integers(0, shape[0])
            edges = (x, y, rng.integers(x + 1, shape[1] + 1), rng.integers(y + 1, shape[0] + 1))
            masks[label] = box(shape, edges, rng.integers(1, 256))
    return masks


def test_each_zoom_shows_what_a_loop_over_the_pixels_says():
    rng = np.random.default_rng(0)
    for _ in range(300):
        masks = random_masks(rng)
        height, width = masks[""].shape
        whole = [[max(int(mask[y, x]) for mask in masks.values()) for x in range(width)] for y in range(height)]
        rows = [y for y in range(height) if any(whole[y])]
        middle = (rows[0] + rows[-1] + 1) / 2  # between the upper edge of the first row and the lower edge of the last
        face = masks.get("face", np.zeros((height, width), np.uint8))
        half = [[max(whole[y][x] if y < middle else 0, int(face[y, x])) for x in range(width)] for y in range(height)]
        assert zoomed("full", masks).tolist() == whole
        assert zoomed("half", masks).tolist() == half
        assert zoomed("face", masks).tolist() == face.tolist()


def test_nothing_of_a_zoom_is_cut_and_it_is_the_smallest_such_crop(tmp_path):
    """The smallest: no bucket's shape holds the mask and its margin on fewer pixels within the picture."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        width, height = (int(side) for side in rng.integers(60, 900, 2))
        x, y = rng.integers(0, width - 20), rng.integers(0, height - 20)
        edges = (x, y, rng.integers(x + 1, width + 1), rng.integers(y + 1, height + 1))
        mask = box((height, width), edges)
        resolution = RESOLUTIONS[rng.integers(len(RESOLUTIONS))]
        buckets = buckets_of(resolution, 16)
        (left, top, right, bottom), bucket = crop_around(mask, buckets, 0.1, enlarge=True)
        assert left <= edges[0] + 1e-6
        assert top <= edges[1] + 1e-6
        assert right >= edges[2] - 1e-6
        assert bottom >= edges[3] - 1e-6
        assert (
            bucket_size(bucket, plain_dataset(tmp_path, tmp_path / "masks", resolution, video=False), FAMILIES["wan"])
            == bucket
        )
        around = 0.1 * max(edges[2] - edges[0], edges[3] - edges[1])
        across = min(width, edges[2] + around) - max(0, edges[0] - around)
        down = min(height, edges[3] + around) - max(0, edges[1] - around)
        fitting = []
        for wide, high in buckets:
            scale = max(across / wide, down / high)
            if scale * wide <= width + 1e-6 and scale * high <= height + 1e-6:
                fitting.append(scale * wide * scale * high)
        if fitting:
            assert (right - left) * (bottom - top) == pytest.approx(min(fitting))
            assert left >= -1e-6
            assert top >= -1e-6
            assert right <= width + 1e-6
            assert bottom <= height + 1e-6


@pytest.fixture
def folder(tmp_path):
    """A person with a face and a logo beside it; a picture with a plain mask only; one of a back, without a face."""
    for name in ("photos/a", "masks/a"):
        (tmp_path / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a/one", "plain", "back"):
        Image.fromarray(rng.integers(0, 256, (300, 200, 3), np.uint8)).save(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "photos" / "a" / "one.txt").write_text("a person")
    for label, edges in (("face", FACE), ("body", PERSON), ("logo", LOGO)):
        Image.fromarray(box((300, 200), edges)).save(tmp_path / "masks" / "a" / f"one.{label}.png")
    Image.fromarray(box((300, 200), PERSON)).save(tmp_path / "masks" / "plain.png")
    Image.fromarray(box((300, 200), PERSON)).save(tmp_path / "masks" / "back.body.png")
    return tmp_path


def run(folder, *flags):
    paths = [f"--{name}={folder / at}" for name, at in (("images", "photos"), ("masks", "masks"), ("output", "out"))]
    return main(["crop", *paths, "--resolution", "128", *map(str, flags)])


def names(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def read(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_command_writes_a_crop_for_each_zoom_with_all_masks_and_the_caption(folder, capsys):
    assert run(folder, "--zoom", "face,half,full", "--mask_labels", "face", "body") == 0
    said = capsys.readouterr()
    assert "7 crops written" in said.out
    for name in ("back", "plain"):
        assert f"{folder / 'photos' / name}.png has no face: no such crop" in said.out
    images = names(folder / "out" / "images")
    assert images == sorted(
        [f"a/one_{zoom}.{kind}" for zoom in ("face", "half", "full") for kind in ("png", "txt")]
        + [f"{name}_{zoom}.png" for name in ("back", "plain") for zoom in ("half", "full")]
    )
    masks = names(folder / "out" / "masks")
    assert masks == sorted(
        [f"a/one_{zoom}.{label}.png" for zoom in ("face", "half", "full") for label in ("face", "body")]
        + [f"back_{zoom}.body.png" for zoom in ("half", "full")]
        + [f"plain_{zoom}.png" for zoom in ("half", "full")]
    )
    assert (folder / "out" / "images" / "a" / "one_half.txt").read_text() == "a person"
    shares = {}
    for zoom in ("face", "half", "full"):
        picture = read(folder / "out" / "images" / "a" / f"one_{zoom}.png")
        face, body = (read(folder / "out" / "masks" / "a" / f"one_{zoom}.{label}.png") for label in ("face", "body"))
        size = picture.shape[1], picture.shape[0]
        assert size in buckets_of((128, 128), 16)
        assert face.shape == body.shape == picture.shape[:2]
        assert cut_share(face, size) == 0
        # All of the face is there: its share of the crop is that of its pixels, and no border touches it.
        assert not any(edge.any() for edge in (face[0], face[-1], face[:, 0], face[:, -1]))
        shares[zoom] = (face > 127).mean()
    assert shares["face"] > 2 * shares["half"] > 2.5 * shares["full"] > 0
    full, half = (read(folder / "out" / "masks" / "a" / f"one_{zoom}.body.png") for zoom in ("full", "half"))
    assert not full[0].any()
    assert not full[-1].any()
    assert half[-1].any(), "the lower half of the person is below the crop"


def test_it_goes_on_where_it_was(folder, capsys):
    assert run(folder, "--zoom", "half", "full") == 0
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.png")}
    assert run(folder, "--zoom", "face", "half") == 0
    assert "1 crops written to" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "out" / "masks" / "a" / "one_face.logo.png").exists(), "without --mask_labels all labels go along"


def test_labels_without_a_zoom_are_one_crop_of_all_of_them(folder):
    assert run(folder, "--mask_labels", "face", "body") == 0
    assert names(folder / "out" / "images") == ["a/one.png", "a/one.txt", "back.png", "plain.png"]
    assert names(folder / "out" / "masks") == ["a/one.body.png", "a/one.face.png", "back.body.png", "plain.png"]


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--zoom", "fase"], "--zoom fase is neither half, full nor a label: the labels are body, face, logo"),
        (
            ["--zoom", "logo", "--mask_labels", "face"],
            "--zoom logo is neither half, full nor a label: the labels are face",
        ),
        (["--zoom", "half", "half"], "--zoom: a label stands twice in half half"),
        (["--mask_labels", "fa/ce"], "--mask_labels: a label is made of letters"),
    ],
)
def test_unknown_zooms_and_labels_are_one_line(folder, capsys, flags, text):
    assert run(folder, *flags) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert text in line
    assert not list((folder / "out").rglob("*.png"))


def test_two_crops_of_one_name_are_refused(folder, capsys):
    (folder / "photos" / "back.png").rename(folder / "photos" / "plain_face.png")
    Image.fromarray(box((300, 200), FACE)).save(folder / "masks" / "plain.face_half.png")
    assert run(folder, "--zoom", "half", "face_half") == 2
    assert "would both give plain_face_half: rename one" in capsys.readouterr().err


def test_a_zoom_whose_label_is_black_is_no_crop_and_a_black_subject_a_problem(folder, capsys):
    for label in ("face", "body", "logo"):
        Image.fromarray(np.zeros((300, 200), np.uint8)).save(folder / "masks" / "a" / f"one.{label}.png")
    assert run(folder, "--zoom", "face") == 0
    assert "one.png has no face: no such crop" in capsys.readouterr().out
    assert run(folder, "--zoom", "full") == 1
    assert "is black: there is nothing to crop" in capsys.readouterr().err


def test_a_broken_picture_is_one_line_for_all_its_zooms(folder, capsys):
    broken = folder / "photos" / "plain.png"
    broken.write_bytes(broken.read_bytes()[:200])
    assert run(folder, "--zoom", "half", "full") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "plain.png" in line]
    assert len(errors) == 1, errors
    assert (folder / "out/images/back_full.png").exists()
