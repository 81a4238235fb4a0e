"""masked-loss cache: the right weights in the right place, once, and nothing else changed."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from masked_loss_triton.masks.geometry import resize_to_bucket, to_latent
from tests.cache.support import Lab, disc, expected, read, weights


def snapshot(lab):
    return {path.name: path.read_bytes() for path in lab.cache.iterdir()}


def test_sources_in_their_order_and_provenance(lab, capsys):
    mask, alpha = disc((160, 120)), disc((160, 120), (0.7, 0.4))
    lab.picture("both", mask=mask, alpha=alpha)
    lab.picture("file", mask=mask)
    lab.picture("opaque", mask=mask, alpha=np.full((120, 160), 255, np.uint8))
    lab.picture("none")
    paths = {stem: lab.add_cache(stem) for stem in ("both", "file", "opaque", "none")}
    before = {stem: load_file(path) for stem, path in paths.items()}
    assert lab.run("cache", "--alpha_mask", "--masks", lab.masks) == 0
    said = capsys.readouterr().out
    assert "4 masks written" in said
    assert "alpha 1, file 2, full 1" in said
    assert "Full weight, no mask: none" in said
    assert torch.equal(weights(paths["both"])[0], expected(alpha))
    assert torch.equal(weights(paths["file"])[0], expected(mask))
    assert torch.equal(weights(paths["opaque"])[0], expected(mask))
    assert torch.equal(weights(paths["none"]), torch.ones(1, 14, 18))
    for stem, path in paths.items():
        tensors, metadata = read(path)
        for name, tensor in before[stem].items():
            assert torch.equal(tensors[name], tensor)
        assert metadata["architecture"] == "wan"
        assert metadata["format_version"] == "1.0.1"
        assert metadata["mask_source"] == {"both": "alpha", "none": "full"}.get(stem, "file")
        assert metadata["mask_file"] == {"none": ""}.get(stem, f"{stem}.png")
        assert len(metadata["mask_hash"]) == 64
        assert json.loads(metadata["mask_operations"])["mask_dilate"] == 0
        assert metadata["mask_version"].startswith("masked_loss_triton ")


def test_a_default_mask_and_a_required_one(lab, capsys):
    lab.picture("none")
    path = lab.add_cache("none")
    before = path.read_bytes()
    assert lab.run("cache", "--masks", lab.masks, "--require_mask") == 1
    assert "none.png has no mask, and require_mask is set" in capsys.readouterr().err
    assert path.read_bytes() == before
    default = lab.folder / "default.png"
    Image.fromarray(disc((50, 50))).save(default)
    assert lab.run("cache", "--default_mask", default, "--require_mask") == 0
    assert read(path)[1]["mask_source"] == "default"
    import cv2

    stretched = cv2.resize(disc((50, 50)), (160, 120), interpolation=cv2.INTER_LINEAR)
    assert torch.equal(weights(path)[0], expected(stretched))


def test_a_required_mask_is_asked_for_again_where_a_cache_is_up_to_date(lab, capsys):
    lab.picture("none")
    lab.picture("some", mask=disc((160, 120)))
    lab.add_cache("none"), lab.add_cache("some")
    flags = ("--masks", lab.masks)
    assert lab.run("cache", *flags, "--require_mask", "--dry_run") == 1
    assert lab.run("cache", *flags) == 0
    capsys.readouterr()
    assert lab.run("cache", *flags, "--require_mask") == 1
    captured = capsys.readouterr()
    assert "none.png has no mask, and require_mask is set" in captured.err
    assert "1 up to date, 1 problems" in captured.out


def test_running_again_writes_only_what_changed(lab, capsys):
    for stem in "abc":
        lab.picture(stem, mask=disc((160, 120)))
        lab.add_cache(stem)
    flags = ("--masks", lab.masks)
    assert lab.run("cache", *flags, "--dry_run") == 0
    assert "Dry run, nothing changed: 3 masks would be written" in capsys.readouterr().out
    assert not any(b"mask_weights" in data for data in snapshot(lab).values())
    assert lab.run("cache", *flags) == 0
    first = snapshot(lab)
    stamps = {path: path.stat().st_mtime_ns for path in lab.cache.iterdir()}
    capsys.readouterr()
    assert lab.run("cache", *flags) == 0
    assert "3 up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in lab.cache.iterdir()} == stamps
    Image.fromarray(disc((160, 120), radius=0.2)).save(lab.masks / "b.png")
    assert lab.run("cache", *flags) == 0
    assert "1 masks written, 2 up to date" in capsys.readouterr().out
    changed = [name for name, data in snapshot(lab).items() if data != first[name]]
    assert [name[0] for name in changed] == ["b"]
    assert lab.run("cache", *flags, "--mask_dilate", "3") == 0
    assert "3 masks written" in capsys.readouterr().out
    assert lab.run("cache", *flags, "--mask_dilate", "3", "--force") == 0
    assert "3 masks written" in capsys.readouterr().out
    assert lab.run("cache", *flags, "--mask_dilate", "3", "--dtype", "float32") == 0
    assert weights(next(lab.cache.iterdir())).dtype == torch.float32
    assert len([name for name in load_file(next(lab.cache.iterdir())) if "mask" in name]) == 1


def test_remove_gives_back_what_the_trainer_wrote(lab, capsys):
    lab.picture("a", mask=disc((160, 120)))
    lab.add_cache("a")
    before = snapshot(lab)
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert snapshot(lab) != before
    assert lab.run("cache", "--remove", "--dry_run") == 0
    assert snapshot(lab) != before
    assert lab.run("cache", "--remove") == 0
    assert snapshot(lab) == before
    assert lab.run("cache", "--remove") == 0
    assert "1 up to date" in capsys.readouterr().out


def test_pixel_operations_reach_the_weights(lab):
    from masked_loss_triton.masks.operations import MaskOperations

    mask = disc((160, 120))
    lab.picture("a", mask=mask)
    path = lab.add_cache("a")
    plain = expected(mask)
    assert lab.run("cache", "--masks", lab.masks, "--mask_dilate", "9", "--mask_blur", "0.01") == 0
    grown = weights(path)[0]
    assert torch.equal(grown, expected(MaskOperations(mask_dilate=9, mask_blur=0.01).apply(mask, "a")))
    assert grown.mean() > plain.mean()
    assert lab.run("cache", "--masks", lab.masks, "--mask_bake_gamma", "2", "--mask_bake_min_weight", "0.5") == 0
    torch.testing.assert_close(weights(path)[0], plain**2 * 0.5 + 0.5, atol=2e-3, rtol=0)
    lab.add_cache("b")
    assert lab.run("cache", "--masks", lab.masks, "--mask_bake_invert") == 0
    torch.testing.assert_close(weights(path)[0], 1 - plain, atol=1e-3, rtol=0)
    assert torch.equal(weights(lab.cache / "b_0160x0120_wan.safetensors"), torch.ones(1, 14, 18))


def test_the_side_of_a_cell_comes_from_the_latents(tmp_path):
    lab = Lab(tmp_path, "hv15")
    lab.picture("a", mask=disc((160, 120)))
    path = lab.add_cache("a", cell=16)
    assert lab.run("cache", "--masks", lab.masks) == 0
    small = resize_to_bucket(disc((160, 120)), (144, 112))
    assert torch.equal(weights(path)[0], torch.from_numpy(to_latent(small, (7, 9))).half().float())


def test_a_cache_of_another_resolution_is_refused(lab, capsys):
    lab.picture("a", mask=disc((160, 120)))
    path = lab.add_cache("a")
    lab.resolution = (256, 192)
    lab.write_toml()
    before = path.read_bytes()
    assert lab.run("cache", "--masks", lab.masks) == 1
    assert "run the caching script again with this dataset file" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_another_aspect_ratio_names_both_files(lab, capsys):
    picture = lab.picture("a", mask=disc((160, 117)))
    path = lab.add_cache("a")
    before = path.read_bytes()
    assert lab.run("cache", "--masks", lab.masks) == 1
    line = capsys.readouterr().err
    assert f"{lab.masks / 'a.png'} is 160x117 but {picture} is 160x120" in line
    assert path.read_bytes() == before
    whole = Image.fromarray(disc((160, 120)))
    whole.resize((80, 60), Image.Resampling.BOX).save(lab.masks / "a.png")
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert (weights(path)[0] - expected(disc((160, 120)))).abs().max() < 0.05


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_mask_of_the_upright_picture_is_turned_back(lab, orientation):
    from PIL import ImageOps

    mask = disc((160, 120), (0.2, 0.3))
    lab.picture("a")
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (160, 120)).save(lab.images / "a.png", exif=exif)
    turned = Image.fromarray(mask)
    turned.getexif()[0x0112] = orientation
    upright = ImageOps.exif_transpose(turned)
    assert upright.size == (120, 160)
    upright.save(lab.masks / "a.png")
    path = lab.add_cache("a")
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert torch.equal(weights(path)[0], expected(mask))


def test_a_json_lines_file_names_masks_line_by_line(lab):
    picture = lab.picture("a")
    mask = lab.folder / "elsewhere.png"
    Image.fromarray(disc((160, 120))).save(mask)
    listing = lab.folder / "items.jsonl"
    listing.write_text(json.dumps({"image_path": str(picture), "caption": "x", "mask_path": str(mask)}) + "\n")
    lab.toml.write_text(
        f'[[datasets]]\nresolution = [128, 128]\nenable_bucket = true\nimage_jsonl_file = "{listing}"\n'
        f'cache_directory = "{lab.cache}"\n'
    )
    path = lab.add_cache("a")
    assert lab.run("cache") == 0
    assert torch.equal(weights(path)[0], expected(disc((160, 120))))


def test_one_frame_caches_carry_the_mask_at_the_target(lab, capsys):
    lab.picture("a", mask=disc((160, 120)))
    lab.write_toml(entry="fp_1f_clean_indices = [0, 7]\nfp_1f_target_index = 3")
    path = lab.add_cache("a", frames=3, extra={"f_indices_int32": torch.tensor([0, 3, 7], dtype=torch.int32)})
    assert lab.run("cache", "--masks", lab.masks) == 0
    result = weights(path)
    assert torch.equal(result[1], expected(disc((160, 120))))
    assert torch.equal(result[[0, 2]], torch.ones(2, 14, 18))
    lab.write_toml()
    assert lab.run("cache", "--masks", lab.masks) == 1
    assert "fp_1f_target_index" in capsys.readouterr().err


def test_layered_caches_get_one_plane_for_each_layer(tmp_path, capsys):
    lab = Lab(tmp_path, "qil")
    lab.write_toml(entry="multiple_target = true")
    layers = [disc((160, 120), (x, 0.5)) for x in (0.3, 0.6)]
    lab.picture("a", mask=disc((160, 120)))
    for index, alpha in enumerate(layers):
        lab.picture(f"a_{index}", alpha=alpha).with_suffix(".txt").unlink()
    path = lab.add_cache("a", frames=3)
    assert lab.run("cache", "--alpha_mask", "--masks", lab.masks) == 0
    result = weights(path)
    for plane, mask in zip(result, [disc((160, 120)), *layers], strict=True):
        assert torch.equal(plane, expected(mask))
    assert read(path)[1]["mask_source"] == "file,alpha,alpha"
    lab.write_toml()
    assert lab.run("cache", "--masks", lab.masks) == 1
    assert "set multiple_target" in capsys.readouterr().err


def test_control_latents_of_an_edit_model_stay(tmp_path):
    lab = Lab(tmp_path, "qie")
    lab.picture("a", mask=disc((160, 120)))
    control = {"latents_control_0_1x20x30_bfloat16": torch.randn(16, 1, 20, 30).bfloat16()}
    path = lab.add_cache("a", extra=control)
    assert lab.run("cache", "--masks", lab.masks) == 0
    assert torch.equal(weights(path)[0], expected(disc((160, 120))))
    assert torch.equal(load_file(path)["latents_control_0_1x20x30_bfloat16"], next(iter(control.values())))
