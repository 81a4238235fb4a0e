"""Labels of masks in caches: the share of each label in each cell, for pictures, layers and clips; check and inspect name them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from masked_loss_triton.masks.geometry import group_frames, resize_to_bucket, to_latent
from tests.cache.support import Lab, disc, frames_of, read, video_lab, weights

BOTH = ("--mask_labels", "face", "body")


def shares(path):
    """Label to (F, h, w) of a cache."""
    tensors, metadata = read(path)
    labels = json.loads(metadata["mask_labels"])
    keys = {label: next(name for name in tensors if name.startswith(f"mask_label_{label}_")) for label in labels}
    assert len(keys) == sum(name.startswith("mask_label_") for name in tensors)
    return {label: tensors[key][0].float() for label, key in keys.items()}


def cells(mask, bucket=(128, 128)):
    return to_latent(resize_to_bucket(mask, bucket), (bucket[1] // 8, bucket[0] // 8))


def test_a_pixel_belongs_to_the_first_label_that_covers_it(tmp_path):
    lab = Lab(tmp_path)
    face, body, plain = (disc((160, 120), radius=radius) for radius in (0.1, 0.3, 0.4))
    lab.picture("a", mask=plain)
    Image.fromarray(face).save(lab.masks / "a.face.png")
    Image.fromarray(body).save(lab.masks / "a.body.png")
    path = lab.add_cache("a")
    assert lab.run("cache", "--masks", lab.masks, *BOTH, "--dtype", "float32") == 0
    found = shares(path)
    height, width = found["face"].shape[1:]
    bucket = (width * 8, height * 8)
    alone = np.minimum(body, 255 - face)
    rest = np.minimum(plain, 255 - face - alone)
    for label, pixels in (("face", face), ("body", alone), ("unlabelled", rest)):
        np.testing.assert_allclose(found[label][0], cells(pixels, bucket), atol=1e-4)  # resized pixels are rounded
    torch.testing.assert_close(weights(path), sum(found.values()).clamp(max=1))
    assert lab.run("cache", "--masks", lab.masks, "--mask_labels", "body", "face", "--dtype", "float32") == 0
    assert float(shares(path)["face"].max()) == 0  # the body covers the face


def test_what_changes_is_cached_again_and_remove_gives_the_file_back(tmp_path, capsys):
    lab = Lab(tmp_path)
    lab.picture("a", mask=disc((160, 120)))
    path = lab.add_cache("a")
    before = path.read_bytes()

    def run(*flags):
        assert lab.run("cache", "--masks", lab.masks, *flags) == 0
        return capsys.readouterr().out.split("(")[0].strip()

    assert run(*BOTH) == "1 masks written"
    assert run(*BOTH) == "1 up to date"
    Image.fromarray(disc((160, 120), radius=0.1)).save(lab.masks / "a.face.png")
    assert run(*BOTH) == "1 masks written"
    assert run("--mask_labels", "face") == "1 masks written"
    assert set(shares(path)) == {"face", "unlabelled"}
    assert run() == "1 masks written"
    assert not any(name.startswith("mask_label_") for name in read(path)[0])
    assert run(*BOTH) == "1 masks written"
    assert lab.run("cache", "--remove") == 0
    assert path.read_bytes() == before


def test_layers_have_labels_of_their_own(tmp_path):
    lab = Lab(tmp_path, suffix="qil")
    lab.write_toml(entry="multiple_target = true")
    for stem, radius in (("a", 0.2), ("a_1", 0.3)):
        lab.picture(stem)
        Image.fromarray(disc((160, 120), radius=radius)).save(lab.masks / f"{stem}.face.png")
    (lab.images / "a_1.txt").unlink()  # a layer of a, and no picture of its own
    path = lab.add_cache("a", frames=2)
    assert lab.run("cache", "--masks", lab.masks, *BOTH) == 0
    first, second = shares(path)["face"]
    assert 0 < float(first.sum()) < float(second.sum())
    assert float(shares(path)["unlabelled"].max()) == 0


def test_labels_of_clips_move_and_stand_still(tmp_path):
    frames, still = frames_of(9), disc((128, 128), radius=0.4)
    lab = video_lab(tmp_path, frames)
    (lab.masks / "clip.face").mkdir()
    for t, frame in enumerate(frames):
        Image.fromarray(frame).save(lab.masks / "clip.face" / f"{t}.png")
    Image.fromarray(still).save(lab.masks / "clip.body.png")
    path = lab.add_cache("clip_00000-009", (128, 128), frames=3)
    assert lab.run("cache", "--masks", lab.masks, *BOTH) == 0
    found = shares(path)
    for label, masks in (("face", frames), ("body", [np.minimum(still, 255 - frame) for frame in frames])):
        expected = group_frames(np.stack([cells(mask) for mask in masks]), 3)
        np.testing.assert_allclose(found[label], expected, atol=6e-4)  # float16
    (lab.masks / "clip.face" / "8.png").unlink()
    assert lab.run("cache", "--masks", lab.masks, *BOTH) == 1


def test_check_and_inspect_name_the_labels(tmp_path, capsys):
    lab = Lab(tmp_path)
    for stem in ("a", "b"):
        lab.picture(stem, mask=disc((160, 120)))
        lab.add_cache(stem)
    Image.fromarray(disc((160, 120), radius=0.1)).save(lab.masks / "a.face.png")
    assert lab.run("cache", "--masks", lab.masks, *BOTH) == 0
    assert lab.run("check", "--masks", lab.masks, *BOTH) == 0
    assert "Labels: face in 1 caches, unlabelled in 2 caches" in capsys.readouterr().out
    assert lab.run("inspect", "--masks", lab.masks, *BOTH, "--output", tmp_path / "sheet") == 0
    page = (tmp_path / "sheet.html").read_text()
    face = float(shares(next(lab.cache.glob("a_*")))["face"].mean())
    assert f"face {face:.1%}; body 0.0%; unlabelled" in page
    Image.fromarray(disc((160, 160))).save(lab.masks / "b.body.png")
    Image.fromarray(disc((160, 120))).save(lab.masks / "b.fcae.png")
    assert lab.run("check", "--masks", lab.masks, *BOTH) == 1
    output = capsys.readouterr().out
    assert "fcae is no label: did you mean face?" in output
    assert f"{lab.masks}/b.body.png" in output.split("aspect")[1]
    lab.run("check", "--masks", lab.masks)
    assert "face is no label: name it: --mask_labels face" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask_labels", "face", "face"], "a label stands twice"),
        (["--mask_labels", "unlabelled"], "is not 'unlabelled'"),
        (["--mask_labels", "fa/ce"], "got 'fa/ce'"),
        ([*BOTH, "--mask_bake_gamma", "0.5"], "mask_bake_* come"),
    ],
)
def test_bad_labels_are_one_line(tmp_path, capsys, flags, message):
    lab = Lab(tmp_path)
    assert lab.run("cache", "--masks", lab.masks, *flags) == 2
    assert message in capsys.readouterr().err
