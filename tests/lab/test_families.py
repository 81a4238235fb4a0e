"""Every model family of the trainer, tiny: caches by its own script, a LoRA by its own training script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from masked_loss_triton.cache.families import FAMILIES as TABLE
from masked_loss_triton.cache.families import REFUSED
from tests.lab.fixture import CORE, FAMILIES
from tests.lab.laboratory import network_module


def test_every_script_of_the_trainer_is_supported_or_refused(musubi):
    scripts = {path.stem for path in (Path(musubi) / "src" / "musubi_tuner").glob("*_train*.py")}
    supported = {family.training_script for family in TABLE.values()}
    assert scripts == supported | REFUSED.keys()
    assert {names.arch or name for name, names in FAMILIES.items()} == TABLE.keys(), (
        "each is trained below, or in test_training"
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in CORE])
def test_a_white_mask_is_the_stock_run_and_a_mask_the_trainers_resize(laboratory, family, tmp_path):
    """White through the network module; then masks and a prior through the launcher.

    The LoRA is 0 at the first step, so that teacher and student agree; outside the mask the loss itself has no gradient.
    """
    white = laboratory.cache(family, "masks_white")
    stock = laboratory.train(family, white, masks=False)
    masked = laboratory.train(family, white, "--network_module", network_module(family), masks=False)
    assert masked.lora == stock.lora
    assert masked.losses == pytest.approx(stock.losses, rel=1e-6)
    assert masked.metadata()["ss_use_mask_loss"] == "True"
    assert masked.metadata()["ss_network_module"] == FAMILIES[family].network

    seen = tmp_path / "seen.jsonl"
    pictures = tuple(f"img{i}" for i in range(6)) if "image" in FAMILIES[family].kinds else ()
    observed = {"LAB_OBSERVE": str(seen), "LAB_MASKS": str(laboratory.fixture / "masks")}
    root = laboratory.cache(family, "masks", pictures)
    run = laboratory.train(family, root, "--use_mask_loss", "--inverted_mask_prior", hooks=("observe",), **observed)
    assert run.status == 0, run.output[-3000:]
    steps = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(steps) == 4
    for step in steps:
        assert step.get("weight_error", 0) <= 1 / 1024  # float16 in the cache
        assert step["outside"] == 0
        assert step["inside"] > 0
    assert steps[0]["prior"] < 1e-5, "of the loss: what bfloat16 leaves between a pass with and one without gradients"
    assert steps[-1]["prior"] > 0
