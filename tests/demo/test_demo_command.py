"""`masked-loss demo` as a user runs it: what it writes, that it repeats, and what it says to wrong flags."""

import json
import math
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image

from masked_loss_triton import MaskedLossConfig
from masked_loss_triton.cli import main

WAYS = ["no_mask", "mask", "mask_min_weight", "mask_prior"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The folder of one quick run in this process, with every network connection refused."""

    def refuse(*_):
        raise AssertionError("the demo opened a network connection")

    output = tmp_path_factory.mktemp("demo") / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        assert main(["demo", "--quick", "--device", "cpu", "--backend", "torch", "--output", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def content(report):
    return json.loads((report / "report.json").read_text())


@pytest.mark.slow
def test_the_folder_is_complete(report):
    files = {str(file.relative_to(report)) for file in report.rglob("*") if file.is_file()}
    names = ["astronaut", "coffee", "flower", "pagoda"]
    expected = {"report.html", "report.json", "config.json", "base/config.json"}
    expected |= {"base/diffusion_pytorch_model.safetensors"}
    expected |= {f"{figure}.png" for figure in ("photos", "samples", "drifts", "curves")}
    expected |= {f"loras/{way}.safetensors" for way in WAYS}
    expected |= {f"{folder}/{name}.png" for folder in ("photos", "masks") for name in names}
    caches = {file for file in files if file.startswith("caches/")}
    assert files - caches == expected
    assert [re.fullmatch(r"caches/(\w+)_\d{4}x\d{4}_wan\.safetensors", file)[1] for file in sorted(caches)] == names
    assert [path.name for path in report.parent.iterdir()] == ["report"]


@pytest.mark.slow
def test_the_report_says_what_was_run(content):
    assert list(content["table"]) == ["base", *WAYS]
    for row in content["table"].values():
        assert list(row) == ["inside", "outside", "drift_outside", "subject_psnr", "background_psnr", "empty_psnr"]
        assert all(value is None or math.isfinite(value) for value in row.values())
    base = content["table"]["base"]
    assert base["drift_outside"] == 0
    assert base["background_psnr"] is base["empty_psnr"] is None
    assert set(content["claims"]) == {
        "every_way_learns_the_subject",
        "mask_leaves_the_background_unlearned",
        "prior_drifts_least_outside",
        "prior_keeps_the_place_of_the_prompt",
        "prior_spares_prompts_without_the_subject",
    }
    assert all(isinstance(holds, bool) for holds in content["claims"].values())
    assert (content["seed"], content["backend"], content["device"], content["quick"]) == (0, "torch", "cpu", True)
    assert (
        content["versions"]["torch"] == torch.__version__.split("+")[0]
        or content["versions"]["torch"] == torch.__version__
    )
    assert len(content["seconds"]) == 8


@pytest.mark.slow
def test_the_losses_of_the_config_can_be_built_again(report):
    config = json.loads((report / "config.json").read_text())
    losses = {way: MaskedLossConfig(**settings["loss"]) for way, settings in config["ways"].items()}
    assert list(losses) == WAYS
    assert losses["mask_min_weight"].min_weight > 0


@pytest.mark.slow
def test_the_page_stands_alone(report, content):
    page = (report / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/webp;base64,") == 8
    assert len(page) < 3_000_000
    assert not re.search(r"(src|href|srcset)=\"(?!data:)|@import|url\(|<script", page)
    assert "$" not in page
    assert "<h1>A quick run" in page
    for row in content["table"].values():
        assert f">{row['inside']:.4f}<" in page
    assert str(report.parent) not in page
    ways = [content["table"][way] for way in WAYS]
    best = {f"{min(way[column] for way in ways):.4f}" for column in ("inside", "outside", "drift_outside")}
    best |= {f"{max(way[f'{kind}_psnr'] for way in ways):.2f}" for kind in ("subject", "background", "empty")}
    assert set(re.findall(r"<td class=best>([^<]+)", page)) == best


@pytest.mark.slow
def test_pictures_can_be_opened_and_are_not_blank(report):
    for file in report.rglob("*.png"):
        with Image.open(file) as image:
            assert image.mode in (("L",) if file.parent.name == "masks" else ("RGB", "RGBA"))
            assert np.asarray(image).std() > 10, file.name


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_base_and_lora_load_in_diffusers(report, way):
    model = WanTransformer3DModel.from_pretrained(report / "base")
    inputs = torch.randn(1, 16, 1, 8, 8), torch.tensor([500.0]), torch.randn(1, 4, 32)
    with torch.no_grad():
        base = model(*inputs, return_dict=False)[0]
        model.load_lora_adapter(report / "loras", weight_name=f"{way}.safetensors")
        assert not torch.equal(model(*inputs, return_dict=False)[0], base)


@pytest.mark.slow
def test_another_process_gets_the_same_numbers_and_the_same_loras(report, content, tmp_path):
    # Another hash seed, so that nothing depends on the order of a set.
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "masked_loss_triton", "demo", "--quick", "--device", "cpu", "--backend", "torch"]
    run = subprocess.run([*command, "--output", "again"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["table"] == content["table"]
    for file in sorted(report.rglob("*.safetensors")):
        twin = tmp_path / "again" / file.relative_to(report)
        assert twin.read_bytes() == file.read_bytes(), file.name
    # Lines of long stages, and no warning of a library but of bitsandbytes, which speaks where it is installed.
    said = [line for line in run.stderr.splitlines() if "gemm_4bit" not in line]
    assert all(re.match(r"\[\d/8\] ", line) for line in said), run.stderr
    assert "the claims are not judged" in run.stdout
    assert "mask + prior" in run.stdout


@pytest.mark.slow
def test_a_users_folder_with_a_broken_picture_and_another_seed(tmp_path, capsys):
    images = tmp_path / "mine"
    images.mkdir()
    random = np.random.default_rng(0)
    alpha = np.zeros((90, 120), np.uint8)
    alpha[20:70, 30:90] = 255
    Image.fromarray(np.dstack([random.integers(0, 256, (90, 120, 3), dtype=np.uint8), alpha])).save(
        images / "a&<b>$x$.png"
    )
    (images / "broken.png").write_bytes(b"nothing")
    output = tmp_path / "report"
    command = ["demo", "--quick", "--device", "cpu", "--images", str(images), "--output", str(output)]
    assert main([*command, "--steps", "1", "--seed", "5"]) == 0
    errors = capsys.readouterr().err
    assert len([line for line in errors.splitlines() if "broken.png" in line]) == 1
    content = json.loads((output / "report.json").read_text())
    assert content["photographs"] == ["a&<b>$x$"]
    assert (content["seed"], content["steps"]) == (5, 1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], "--steps must be a whole number from 1"),
        (["--steps", "many"], "--steps must be a whole number"),
        (["--steps", "1.5"], "--steps must be a whole number"),
        (["--seed", "-1"], "--seed must be a whole number from 0"),
        (["--seed", str(2**64)], "--seed must be a whole number"),
        (["--device", "tpu"], "--device must be one of auto, cpu, cuda"),
        (["--backend", "numpy"], "--backend must be one of auto, torch, triton, reference"),
        (["--images", "nowhere"], "there is no such folder"),
        (["--images", "taken"], "not a folder"),
        (["--output", "taken"], "a file of that name"),
        (["--output", "thesis"], "not empty and not a former report"),
    ],
)
def test_a_wrong_flag_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    assert main(["demo", *flags]) == 2
    errors = capsys.readouterr().err
    assert words in errors
    assert errors.count("\n") == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["chapter.txt", "taken", "thesis"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize(("flag", "value"), [("--device", "cuda"), ("--backend", "triton")])
def test_what_needs_a_gpu_is_refused_without_one(tmp_path, monkeypatch, capsys, flag, value):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["demo", flag, value]) == 2
    errors = capsys.readouterr().err
    assert f"{flag} {value}" in errors
    assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_imports_nothing_heavy():
    code = "import sys; from masked_loss_triton.commands import demo; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"diffusers", "peft", "matplotlib", "cv2", "transformers"} & set(modules)
