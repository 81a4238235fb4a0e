"""The real trainers, end to end: a checkout of musubi-tuner in MUSUBI_REPO, and in MUSUBI_LAB a harness that runs it on CPU with
tiny random models (run_train.py, fixture in MUSUBI_FIXTURE). Neither can be had in CI; recorded.py takes their place there.

Everything runs in processes of its own: dataset files, caches, flags, training, the saved LoRA.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO, LAB, FIXTURE = (os.environ.get(name) for name in ("MUSUBI_REPO", "MUSUBI_LAB", "MUSUBI_FIXTURE"))
FAMILIES = ("wan", "hv", "qwen")
HOOKS = Path(__file__).parent
pytestmark = [
    pytest.mark.skipif(
        not (REPO and LAB and FIXTURE),
        reason="needs MUSUBI_REPO, MUSUBI_LAB and MUSUBI_FIXTURE: a checkout, its harness",
    ),
    pytest.mark.slow,
]


class Run:
    """One training run: what it printed, its losses, the hash and the tensors of its LoRA."""

    def __init__(self, process: subprocess.CompletedProcess, result: Path, lora: Path) -> None:
        self.status, self.output = process.returncode, process.stdout + process.stderr
        self.lora_file = lora
        self.record = json.loads(result.read_text()) if result.exists() else {}

    @property
    def losses(self) -> list[float]:
        assert "losses" in self.record, self.output[-3000:]
        return self.record["losses"]

    @property
    def lora(self) -> str:
        assert "lora_sha256" in self.record, self.output[-3000:]
        return self.record["lora_sha256"]

    def tensors(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        assert self.lora_file.exists(), self.output[-3000:]
        return load_file(self.lora_file)

    def metadata(self) -> dict[str, str]:
        from safetensors import safe_open

        with safe_open(self.lora_file, "pt") as file:
            return file.metadata()


class Laboratory:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.caches: dict[tuple[str, str], Path] = {}

    def cache(self, family: str, masks: str, stems: tuple[str, ...] = ()) -> Path:
        """A copy of the fixture's caches with masks of the folder `masks` in them; `stems` keeps only some pictures."""
        key = (family, masks + "".join(stems))
        if key not in self.caches:
            root = self.folder / "-".join(key)
            shutil.copytree(Path(FIXTURE) / "cache" / family, root)
            images = Path(FIXTURE) / "images"
            if stems:
                images = root / "pictures"
                images.mkdir()
                for stem in stems:
                    for end in (".png", ".txt"):
                        shutil.copy(Path(FIXTURE) / "images" / f"{stem}{end}", images)
                for path in (root / "image").iterdir():
                    if path.name.split("_")[0] not in stems:
                        path.unlink()
            if masks:
                self.masked_loss("cache", "--dataset_config", self.toml(family, root, images), "--arch", family)
            self.caches[key] = root
        return self.caches[key]

    def toml(
        self, family: str, root: Path, images: Path | None = None, batch_size: int = 1, masks: bool = True
    ) -> Path:
        folder = root.name.split("-")[1][:5]
        images = images or Path(FIXTURE) / "images"
        lines = ['[general]\ncaption_extension = ".txt"\nenable_bucket = true\n', f"batch_size = {batch_size}\n"]
        lines += [f'[[datasets]]\nresolution = [256, 256]\nimage_directory = "{images}"\n']
        lines += [f'cache_directory = "{root}/image"\n']
        if masks:
            name = "masks_white" if folder == "white" else "masks"
            lines += [f'mask_directory = "{FIXTURE}/{name}"\n']
        if (root / "video").exists() and "pictures" not in str(images):
            lines += [f'[[datasets]]\nresolution = [128, 128]\nvideo_directory = "{FIXTURE}/videos"\n']
            lines += [f'cache_directory = "{root}/video"\ntarget_frames = [1, 9]\nframe_extraction = "head"\n']
            if masks and folder != "white":
                lines += [f'mask_directory = "{FIXTURE}/video_masks"\n']
        path = root / f"{'masks' if masks else 'train'}_{batch_size}.toml"
        path.write_text("".join(lines))
        return path

    def masked_loss(self, *arguments: str | Path) -> None:
        command = [sys.executable, "-m", "masked_loss_triton", *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True)

    def train(
        self, family: str, root: Path, *flags: str, steps: int = 4, hooks: str = "launcher", batch_size: int = 2,
        name: str = "lora", processes: int = 1, harness: tuple[str, ...] = (), **environment: str,
    ) -> Run:  # fmt: skip
        work = self.folder / "work"
        result = self.folder / f"{name}.json"
        result.unlink(missing_ok=True)
        lora = work / "out" / f"{name}.safetensors"
        lora.unlink(missing_ok=True)
        pictures = root / "pictures" if (root / "pictures").exists() else None
        toml = self.toml(family, root, pictures, batch_size, masks=False)
        python = [sys.executable]
        if processes > 1:
            python += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "29517"]
            environment["ACCELERATE_USE_CPU"] = "true"
        command = [*python, f"{LAB}/run_train.py", family, str(steps), "--toml", str(toml), "--out", name]
        command += ["--json", str(result), *harness, *flags]
        hook = ",".join(f"lab_hook:{one}" for one in hooks.split(",") if one)
        given = {**os.environ, "HOOK": hook, "MUSUBI_WORK": str(work), "OMP_NUM_THREADS": "1", **environment}
        process = subprocess.run(command, cwd=HOOKS, env=given, capture_output=True, text=True, timeout=300)
        return Run(process, result, lora)


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    return Laboratory(tmp_path_factory.mktemp("laboratory"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_white_mask_is_the_stock_run(laboratory, family):
    root = laboratory.cache(family, "white")
    stock = laboratory.train(family, root, hooks="", steps=8)
    masked = laboratory.train(family, root, "--use_mask_loss", steps=8)
    assert masked.lora == stock.lora
    assert masked.losses == pytest.approx(stock.losses, rel=1e-6)
    assert "masks are on" in masked.output


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["launcher", "network module"])
def test_weights_are_the_trainers_resize_and_nothing_is_learned_outside(laboratory, family, way, tmp_path):
    root = laboratory.cache(family, "masks", tuple(f"img{i}" for i in range(6)))
    seen = tmp_path / "seen.jsonl"
    lora = {"wan": "musubi.lora_wan", "hv": "musubi.lora_hv", "qwen": "musubi.lora_qwen"}[family]
    flags = ["--use_mask_loss"]
    if way == "network module":
        flags = ["--network_module", f"masked_loss_triton.integration.{lora}"]
    run = laboratory.train(
        family, root, *flags, hooks="observe,launcher" if way == "launcher" else "observe",
        LAB_OBSERVE=str(seen), LAB_MASKS=f"{FIXTURE}/masks",
    )  # fmt: skip
    assert run.status == 0, run.output[-3000:]
    steps = [json.loads(line) for line in seen.read_text().splitlines()]
    assert len(steps) == 4
    for step in steps:
        assert step["weight_error"] <= 1 / 1024  # float16 in the cache
        assert step["outside"] == 0
        assert step["inside"] > 0
    names = {"wan": "networks.lora_wan", "hv": "networks.lora", "qwen": "networks.lora_qwen_image"}
    assert run.metadata()["ss_network_module"] == names[family]
    assert run.metadata()["ss_use_mask_loss"] == "True"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prior_of_weight_0_is_none(laboratory, family):
    root = laboratory.cache(family, "masks")
    without = laboratory.train(family, root, "--use_mask_loss")
    zero = laboratory.train(
        family, root, "--use_mask_loss", "--inverted_mask_prior", "--inverted_mask_prior_weight", "0"
    )
    with_prior = laboratory.train(family, root, "--use_mask_loss", "--inverted_mask_prior")
    assert without.lora == zero.lora != with_prior.lora
    assert "does nothing with --inverted_mask_prior_weight 0" in zero.output


@pytest.mark.parametrize("family", FAMILIES)
def test_resumed_is_uninterrupted(laboratory, family):
    """Eight steps at once, and four twice. One picture: the trainer starts its epochs, and with them its order, anew."""
    root = laboratory.cache(family, "masks", ("img0",))
    flags = ["--use_mask_loss", "--inverted_mask_prior", "--prior_teacher", "ema", "--prior_ema_decay", "0.5"]
    flags += ["--mask_probability", "0.6", "--save_state", "--save_every_n_epochs", "2"]
    hooks = "fixed_noise,launcher"
    whole = laboratory.train(family, root, *flags, steps=8, hooks=hooks, batch_size=1, name="whole")
    half = laboratory.train(family, root, *flags, steps=4, hooks=hooks, batch_size=1, name="half")
    state = half.lora_file.parent / "half-state"
    rest = laboratory.train(
        family, root, *flags, "--resume", str(state), steps=4, hooks=hooks, batch_size=1, name="rest"
    )
    assert half.losses == whole.losses[:4]
    assert rest.losses == whole.losses[4:]
    assert rest.lora == whole.lora
    anew = laboratory.train(
        family, root, *flags[:-5], "--resume", str(state), steps=4, hooks=hooks, batch_size=1, name="anew"
    )
    assert anew.lora != whole.lora  # without --mask_probability


@pytest.mark.parametrize("way", ["two processes", "two micro-batches"])
def test_more_than_one_batch_is_the_one_large_batch(laboratory, way):
    """The stock trainer sets the measure: its own model differs by about 1e-3 between one batch of two and two of one."""
    root = laboratory.cache("wan", "masks", ("img2", "img4"))
    common = ["--optimizer_type", "SGD", "--max_grad_norm", "0", "--learning_rate", "1"]
    parts = {"processes": 2} if way == "two processes" else {}
    split = ["--gradient_accumulation_steps", "2"] if way == "two micro-batches" else []

    def difference(*flags: str, hooks: str) -> float:
        given = {"steps": 1, "hooks": hooks, "harness": ("--precision", "fp32")}
        one = laboratory.train("wan", root, *common, *flags, batch_size=2, name="one", **given)
        two = laboratory.train("wan", root, *common, *flags, *split, batch_size=1, name="two", **parts, **given)
        return relative_difference(one.tensors(), two.tensors())

    hooks = "frozen_model_on_cpu,fixed_noise"
    stock = difference(hooks=hooks)
    masks = ["--use_mask_loss"]
    if way == "two processes":
        masks.append("--inverted_mask_prior")
        across = "world"
    else:
        across = "accumulation"
    assert stock < 5e-3
    assert difference(*masks, "--mask_normalize_across", across, hooks=f"{hooks},launcher") < 2 * stock
    assert difference(*masks, hooks=f"{hooks},launcher") > 10 * stock


def relative_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Of the up weights, which start at 0: largest difference over largest value."""
    ups = [name for name in one if "lora_up" in name]
    largest = max(float(one[name].abs().max()) for name in ups)
    assert largest > 0
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in ups) / largest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mask_gamma", "0"], "--mask_gamma must be > 0"),
        (["--mask_blur_kernel_size", "4"], "--mask_blur_kernel_size must be 0 (off) or an odd integer"),
        (["--inverted_mask_prior", "--prior_decay_schedule", "linear"], "add --normalize_per_sample"),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_bad_flags_fail_before_anything_is_loaded(laboratory, family, flags, message):
    run = laboratory.train(family, laboratory.cache(family, "masks"), "--use_mask_loss", *flags)
    assert run.status == 2
    lines = [line for line in run.output.splitlines() if line.startswith("masked-loss train:")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Loading" not in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("family", FAMILIES)
def test_caches_without_masks_fail_before_anything_is_loaded(laboratory, family):
    root = laboratory.cache(family, "")
    run = laboratory.train(family, root, "--use_mask_loss")
    assert run.status == 1
    assert "latent caches have no mask" in run.output
    assert f"masked-loss cache --dataset_config {root}/train_2.toml --arch {family}" in run.output
    assert "Loading" not in run.output
    stock = laboratory.train(family, root, hooks="")
    off = laboratory.train(family, root)
    assert off.lora == stock.lora
    assert "masks are not used" in off.output


def test_help_and_config_file_know_the_flags(laboratory, tmp_path):
    root = laboratory.cache("wan", "masks")
    command = [sys.executable, "-m", "masked_loss_triton", "train", "--musubi", str(REPO), "hv", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert "--prior_timestep_threshold" in shown
    assert "--blocks_to_swap" in shown
    config = tmp_path / "config.toml"
    config.write_text("[mask]\nuse_mask_loss = true\nmask_gamma = 0.5\n")
    by_file = laboratory.train("wan", root, "--config_file", str(config))
    by_flag = laboratory.train("wan", root, "--use_mask_loss", "--mask_gamma", "0.5")
    assert by_file.lora == by_flag.lora
    assert by_file.metadata()["ss_mask_gamma"] == "0.5"


def test_numbers_reach_the_trainers_own_log(laboratory, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    root = laboratory.cache("wan", "masks")
    flags = ["--use_mask_loss", "--inverted_mask_prior", "--logging_dir", str(tmp_path), "--log_with", "tensorboard"]
    run = laboratory.train("wan", root, *flags)
    silent = laboratory.train("wan", root, *flags[:2])
    assert run.lora == silent.lora
    (events,) = tmp_path.rglob("events.out*")
    log = EventAccumulator(str(events.parent)).Reload()
    read = {name: [event.value for event in log.Scalars(name)] for name in log.Tags()["scalars"]}
    assert len(read["mask/coverage"]) == 4
    assert all(0 < value < 1 for value in read["mask/coverage"])
    for total, target, prior in zip(
        read["loss/current"], read["mask/target_loss"], read["mask/prior_loss"], strict=True
    ):
        assert total == pytest.approx(target + prior, rel=1e-5)
    assert read["mask/applied_rate"] == [1.0] * 4


INLINE = {"blissful-tuner": ("BLISSFUL_REPO", "blissful_on_cpu"), "musubi-tuner 0.2": ("MUSUBI_02_REPO", "")}


@pytest.mark.parametrize("trainer", INLINE)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["launcher", "network module"])
def test_trainers_whose_loss_is_no_method(laboratory, trainer, family, way):
    """A white mask is the stock run, and masks with a prior, huber and a weighting give the losses of the newer trainer."""
    variable, hook = INLINE[trainer]
    repo = os.environ.get(variable)
    if not repo:
        pytest.skip(f"needs a checkout of {trainer} in {variable}")
    module = {"wan": "musubi.lora_wan", "hv": "musubi.lora_hv", "qwen": "musubi.lora_qwen"}[family]
    switched = ["--network_module", f"masked_loss_triton.integration.{module}"]
    launcher = f"{hook},launcher" if way == "launcher" else hook
    # WAN of blissful-tuner takes no batch of two without a GPU.
    given = {"steps": 3, "batch_size": 1, "MUSUBI_REPO": repo}
    white = laboratory.cache(family, "white")
    stock = laboratory.train(family, white, hooks=hook, **given)
    on = ["--use_mask_loss"] if way == "launcher" else switched
    masked = laboratory.train(family, white, *on, hooks=launcher, **given)
    assert masked.lora == stock.lora
    assert masked.losses == pytest.approx(stock.losses, rel=1e-6)
    assert masked.metadata()["ss_use_mask_loss"] == "True"
    assert "masked_loss_triton" not in masked.metadata()["ss_network_module"]

    if family == "wan" and trainer == "blissful-tuner":
        return  # its model is another one
    options = {"inverted_mask_prior": "true", "loss_type": "huber", "mask_min_weight": "0.1"}
    if way == "launcher":
        flags = ["--use_mask_loss", "--inverted_mask_prior", "--loss_type", "huber", "--mask_min_weight", "0.1"]
    else:
        flags = [*switched, "--network_args", *(f"{name}={value}" for name, value in options.items())]
    scheme = [] if family == "qwen" else ["--weighting_scheme", "cosmap"]
    root = laboratory.cache(family, "masks")
    old = laboratory.train(family, root, *flags, *scheme, hooks=launcher, **given)
    newer = laboratory.train(
        family, root, *flags, *scheme, steps=3, batch_size=1, hooks="launcher" if way == "launcher" else ""
    )
    assert old.losses == pytest.approx(newer.losses, rel=1e-3)
