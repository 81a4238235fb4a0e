"""Reading the trainer's caches: what is wrong is one line that names the file and what mends it."""

import pytest
import torch
from latent_caches import CachedLatents, collate, find_items
from model_families import FAMILIES
from safetensors.torch import load_file, save_file
from train_diffusers import main

from masked_loss_triton.errors import UserError
from tests.support.caches import add_text, caches

NAMES = sorted(FAMILIES)


def refused(lab, match, **options):
    with pytest.raises(UserError, match=match):
        find_items([lab.cache], FAMILIES[lab.arch], **{"use_masks": True, **options})


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_without_mask_names_the_command(name, tmp_path, capsys):
    lab = caches(tmp_path / "data", name, masks="none", stems="a")
    refused(lab, rf"a_0128x0128_{lab.suffix}.safetensors has no mask: run `masked-loss cache .*--arch {name}`")
    command = ["--arch", name, "--tiny", "--cpu", "--cache", str(lab.cache), "--output", str(tmp_path / "lora")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("train_diffusers.py: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_without_text_names_the_script(name, tmp_path):
    lab = caches(tmp_path, name, stems="a")
    (lab.cache / f"a_{lab.suffix}_te.safetensors").unlink()
    refused(lab, rf"has no text cache, a_{lab.suffix}_te.safetensors: run {FAMILIES[name].text_script}")


def test_masks_of_another_shape_damaged_files_and_other_tasks(tmp_path):
    lab = caches(tmp_path, "wan", stems="a")
    (path,) = lab.cache.glob("*_wan.safetensors")
    tensors = load_file(path)
    (mask,) = [name for name in tensors if name.startswith("mask_weights")]
    save_file({**tensors, mask: torch.ones(1, 1, 4, 4)}, path)
    refused(lab, "does not fit latents of .*--force")
    save_file({**tensors, "latents_image_1x16x16_bfloat16": torch.ones(1)}, path)
    refused(lab, "image-to-video or editing")
    save_file({mask: tensors[mask]}, path)
    refused(lab, "has no latents in it")
    path.write_bytes(path.read_bytes()[:-3])
    refused(lab, f"{path} is cut short or damaged")
    path.unlink()
    refused(lab, "no latent cache")
    with pytest.raises(UserError, match=r"--cache .*/nowhere is not a folder"):
        find_items([tmp_path / "nowhere"], FAMILIES["wan"], use_masks=True)


def test_a_text_cache_of_another_model(tmp_path):
    lab = caches(tmp_path, "wan", stems="a")
    save_file({"llm_float16": torch.zeros(3, 8).half()}, lab.cache / "a_wan_te.safetensors")
    items = find_items([lab.cache], FAMILIES["wan"], use_masks=True)
    with pytest.raises(UserError, match=r"a_wan_te.safetensors has no varlen_t5 in it"):
        CachedLatents(items, FAMILIES["wan"], seed=0, shift=3.0)[0, 0]


def test_what_a_batch_holds(tmp_path):
    for name, text in (
        ("wan", {"embeds": (2, 512, 4096), "mask": (2, 512)}),
        ("hv", {"embeds": (2, 32, 4096), "mask": (2, 32), "pooled": (2, 768)}),
        ("qwen", {"embeds": (2, 6, 3584), "mask": (2, 6)}),
    ):
        lab, family = caches(tmp_path / name, name, stems="ab"), FAMILIES[name]
        items = find_items([lab.cache], family, use_masks=True)
        dataset = CachedLatents(items, family, seed=0, shift=3.0)
        batch = collate([dataset[0, 7], dataset[1, 8]])
        assert batch["latents"].shape == batch["noise"].shape == (2, 16, 1, 16, 16)
        assert batch["mask"].shape == (2, 1, 1, 16, 16)
        assert {key: tuple(value.shape) for key, value in batch["text"].items()} == text
        stored = load_file(items[0].path)[items[0].latents].float()
        torch.testing.assert_close(batch["latents"][0], stored * (0.476986 if name == "hv" else 1))
        assert batch["text"]["mask"].dtype == torch.bool
        assert batch["text"]["mask"].sum(1).tolist() == [5, 6]
        # The draw decides noise and level, whatever else is in the batch.
        again = dataset[0, 7]
        assert torch.equal(again["noise"], batch["noise"][0])
        assert not torch.equal(again["noise"], dataset[0, 8]["noise"])


def test_clips_share_the_text_of_their_video(tmp_path):
    lab = caches(tmp_path, "wan", stems="a")
    lab.add_cache(
        "clip_00000-009", (128, 128), frames=3, extra={"mask_weights_3x16x16_float16": torch.ones(1, 3, 16, 16)}
    )
    add_text(lab, "clip", 4)
    items = find_items([lab.cache], FAMILIES["wan"], use_masks=True)
    assert [item.shape for item in items] == [(1, 16, 16), (3, 16, 16)]
    assert items[1].text.name == "clip_wan_te.safetensors"


def test_noise_levels_stay_in_their_range(tmp_path):
    lab = caches(tmp_path, "wan", stems="a")
    items = find_items([lab.cache], FAMILIES["wan"], use_masks=True)
    dataset = CachedLatents(items, FAMILIES["wan"], seed=0, shift=3.0, sigma_range=(0.875, 1.0))
    sigmas = torch.stack([dataset[0, draw]["sigma"] for draw in range(50)])
    assert sigmas.min() >= 0.875
    assert sigmas.std() > 0.01


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--mask_probability", "2"], r"--mask_probability must be in [0, 1], got 2.0"),
        (["--mask_gamma", "0"], "gamma must be > 0"),
        (["--min_sigma", "0.9", "--max_sigma", "0.8"], "0.05 apart, got 0.9 and 0.8"),
        (["--ignore_masks", "--prior_weight", "1"], "with --ignore_masks there is no such region"),
    ],
)
def test_bad_flags_fail_before_anything_is_read(flags, message, tmp_path, capsys):
    command = ["--arch", "wan", "--tiny", "--cache", str(tmp_path / "nowhere"), "--output", str(tmp_path / "lora")]
    assert main([*command, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
