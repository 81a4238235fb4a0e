"""Routing in the real trainers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.lab.fixture import CORE, ROOT

pytestmark = pytest.mark.slow
HALF = ("--use_mask_loss", "--mask_routing", "0.5", "--mask_routing_blocks")
BLOCKS = {"wan": "0-1", "hv": "1-3", "qwen": "0-0"}


@pytest.mark.parametrize("family", CORE)
def test_keeping_all_tokens_learns_the_same_lora(laboratory, family):
    """Without hooks, and with all tokens going through them; half the tokens learn another one."""
    root = laboratory.cache(family, "masks")
    stock = laboratory.train(family, root, "--use_mask_loss")
    whole = laboratory.train(family, root, "--use_mask_loss", "--mask_routing", "1")
    hooks = laboratory.train(family, root, *HALF, BLOCKS[family], hooks=("every_token_through_the_hooks",))
    half = laboratory.train(family, root, *HALF, BLOCKS[family])
    assert stock.lora == whole.lora == hooks.lora != half.lora
    assert stock.losses == whole.losses == hooks.losses
    assert half.metadata()["ss_mask_routing"] == "0.5"


@pytest.mark.parametrize("family", CORE)
def test_gradient_checkpointing_teaches_the_same(laboratory, family):
    root = laboratory.cache(family, "masks")
    flags = [*HALF, BLOCKS[family], "--inverted_mask_prior", "--mask_min_weight", "0.1"]
    plain = laboratory.train(family, root, *flags)
    checkpointed = laboratory.train(family, root, *flags, "--gradient_checkpointing")
    assert plain.losses == pytest.approx(checkpointed.losses, rel=1e-3)
    assert len(plain.losses) == 4


@pytest.mark.parametrize("family", CORE)
def test_nothing_is_learned_outside_and_at_dropped_tokens(laboratory, family, tmp_path):
    seen = tmp_path / "seen.jsonl"
    root = laboratory.cache(family, "masks", tuple(f"img{i}" for i in range(6)))
    observed = {"LAB_OBSERVE": str(seen), "LAB_MASKS": str(laboratory.fixture / "masks")}
    run = laboratory.train(family, root, *HALF, BLOCKS[family], hooks=("observe",), **observed)
    assert run.status == 0, run.output[-3000:]
    steps = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(steps) == 4
    for step in steps:
        assert step["outside"] == step["dropped"] == 0
        assert step["inside"] > 0


GOES_WITH = {
    "LoHa": ("--network_module", "networks.loha"),
    "LoKr": ("--network_module", "networks.lokr"),
    "fp8": ("--fp8_base", "--fp8_scaled"),
    "compiled blocks": ("--compile", "--compile_backend", "eager"),
    "accumulation": ("--gradient_accumulation_steps", "2", "--mask_normalize_across", "accumulation"),
}


@pytest.mark.parametrize("what", GOES_WITH)
def test_it_goes_with(laboratory, what):
    """All tokens through the hooks is the unrouted run; half of them trains."""
    root = laboratory.cache("wan", "masks", ("img0", "img2"))
    flags = GOES_WITH[what]
    given = {"batch_size": 1, "steps": 2}
    plain = laboratory.train("wan", root, "--use_mask_loss", *flags, **given)
    hooks = ("every_token_through_the_hooks",)
    every = laboratory.train("wan", root, *HALF, BLOCKS["wan"], *flags, hooks=hooks, **given)
    half = laboratory.train("wan", root, *HALF, BLOCKS["wan"], *flags, **given)
    assert plain.lora == every.lora != half.lora


def test_resumed_keeps_the_same_tokens_and_the_log_counts_them(laboratory, tmp_path):
    """Four steps at once, and two twice, with a teacher who computes every token. One picture, so that the order is the same."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root = laboratory.cache("wan", "masks", ("img0",))
    flags = [*HALF, BLOCKS["wan"], "--inverted_mask_prior", "--save_state", "--save_every_n_epochs", "2"]
    flags += ["--log_with", "tensorboard", "--logging_dir", str(tmp_path / "log")]

    def train(name, steps, *more):
        seen = tmp_path / name
        given = {"steps": steps, "hooks": ("fixed_noise", "watch_routing"), "batch_size": 1, "name": name}
        run = laboratory.train("wan", root, *flags, *more, LAB_OBSERVE=str(seen), **given)
        return run, [json.loads(line) for line in seen.read_text().splitlines()]

    whole, seen = train("whole", 4)
    half, _ = train("half", 2)
    rest, seen_later = train("rest", 2, "--resume", str(half.lora_file.parent / "half-state"))
    assert rest.losses == whole.losses[2:]
    assert rest.lora == whole.lora
    assert [one["kept"] for one in seen_later] == [one["kept"] for one in seen[2:]]
    assert seen[0]["kept"] != seen[1]["kept"]
    tokens = len(seen[0]["kept"][0])
    every = seen[0]["passes"][0][1]
    assert tokens == -(-every // 2)
    for step in seen:
        assert [count for _, count in step["passes"]] == [every, tokens]  # the teacher's, the student's
        assert step["hooks"] == 0
    events = min((tmp_path / "log").rglob("events.out*"), key=os.path.getmtime)
    log = EventAccumulator(str(events.parent)).Reload()
    read = {name: [event.value for event in log.Scalars(name)] for name in log.Tags()["scalars"]}
    assert read["mask/routing_kept"] == pytest.approx([tokens / every] * 4)
    assert all(0 < value < 1 for value in read["mask/routing_weighted"])
    assert all(
        0.5 < value < 0.75 for value in read["mask/routing_saved"]
    )  # both blocks: by the tokens, and by their square


def test_samples_of_a_routed_run_are_drawn_with_every_token(laboratory, tmp_path):
    """The trainer draws pictures before the first step and after every one, by its own sampler and VAE: each pass computes all of
    their 8 x 8 tokens, and training goes on as in a run that draws none."""
    root = laboratory.cache("wan", "masks", ("img0",))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a mug --w 128 --h 128 --f 1 --s 2 --d 5\n")
    draws = ["--sample_prompts", str(prompts), "--sample_at_first", "--sample_every_n_steps", "1"]
    draws += ["--vae", str(laboratory.fixture / "weights" / "wan_vae_fp32.safetensors")]
    seen = tmp_path / "seen"
    given = {
        "steps": 2,
        "batch_size": 1,
        "name": "drawn",
        "hooks": ("fixed_noise", "watch_routing", "words_without_t5"),
    }
    run = laboratory.train("wan", root, *HALF, BLOCKS["wan"], *draws, LAB_OBSERVE=str(seen), **given)
    steps = [json.loads(line) for line in seen.read_text().splitlines()] if seen.exists() else []
    assert len(steps) == 2, run.output[-3000:]
    for step in steps:
        assert step["passes"][-1][1] == len(step["kept"][0])
    *drawn, _ = steps[1]["passes"]  # passes are counted from the first step on
    assert len(drawn) >= 2
    assert all(count == 64 for _, count in drawn)
    pictures = list((run.lora_file.parent / "sample").iterdir())  # at the ends of steps, and of epochs
    assert len(pictures) >= 3, pictures
    without = laboratory.train(
        "wan", root, *HALF, BLOCKS["wan"], **{**given, "hooks": ("fixed_noise",), "name": "plain"}
    )
    assert run.losses == without.losses
    assert run.lora == without.lora


def test_cross_attention_gated_by_a_white_mask_is_the_ungated_run(laboratory):
    white, masks = (laboratory.cache("wan", name) for name in ("masks_white", "masks"))
    gated = ["--use_mask_loss", "--mask_cross_attention"]
    assert laboratory.train("wan", white, *gated).lora == laboratory.train("wan", white, *gated[:1]).lora
    plain, checkpointed = (
        laboratory.train("wan", masks, *gated),
        laboratory.train("wan", masks, *gated, "--gradient_checkpointing"),
    )
    assert plain.lora != laboratory.train("wan", masks, *gated[:1]).lora
    assert plain.losses == pytest.approx(checkpointed.losses, rel=1e-3)


def test_two_processes_draw_tokens_of_their_own(laboratory):
    root = laboratory.cache("wan", "masks", ("img0", "img2"))
    flags = [*HALF, BLOCKS["wan"], "--mask_normalize_across", "world"]
    run = laboratory.train("wan", root, *flags, processes=2, batch_size=1, hooks=("frozen_model_on_cpu",))
    assert run.status == 0, run.output[-3000:]
    assert len(run.lora) == 64


def test_the_trainers_models_equal_the_oracle(musubi):
    """WAN 2.1 and 2.2, text and picture to video; HunyuanVideo; Qwen-Image, edit, layered: to 2e-6 in float32, 1e-12 in float64.
    With checkpoints and swapped blocks, bit for bit; NaN in dropped tokens stays there."""
    command = [sys.executable, "-m", "tests.lab.routed_models"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    given = {**os.environ, "PYTHONPATH": paths}
    run = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 22
    for one in found:
        assert one["all"], one
        assert one["differs"], one
        assert one["checkpointed"], one
        assert one["swapped"], one
        assert one["moves"] > 4, one
        assert one["nan stays"], one
    exact = {one["model"]: one["prediction"] for one in found if one["dtype"] == "float64"}
    for family in ("hv", "qwen"):
        assert exact[f"{family} split"] == pytest.approx(exact[family], rel=1e-12)
