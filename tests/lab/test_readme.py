"""As a new user: the commands of the README and of the quick starts, copied from the pages, in the trainer's own folder.

From photographs and a checkout of the trainer to a LoRA, with the package installed by pip beside the trainer's packages. Scripts,
datasets, loops and LoRAs are the trainer's own; its models are tiny and random, in files of the names that the pages use. One
command does not run: text encoders are too large, so that random text caches stand in for theirs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.documentation.blocks import ROOT, Line, blocks, lines
from tests.documentation.stand_ins import furnish, open_and_end
from tests.lab.fixture import FAMILIES, ensure_fixture, weights

pytestmark = pytest.mark.slow
TINY = "import sys; sys.path.append({root!r})\nfrom tests.lab import tiny\ntiny.install()\n"
TEXTS = "import sys; from tests.lab import fixture; fixture.trainer_path(); fixture.cache_text(*sys.argv[1:])"


class Newcomer:
    """The trainer's folder with photographs in it, a checkout of this project beside it, and an environment with pip."""

    def __init__(self, folder: Path, musubi: str) -> None:
        self.home, self.checkout = folder / "musubi-tuner", folder / "masked_loss_triton"
        furnish(self.home, masks=False)
        for script in Path(musubi).glob("*.py"):
            (self.home / script.name).symlink_to(script)
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in listed.split("\n")[:-1]:
            (self.checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.checkout / name, follow_symlinks=False)
        self.site = self.environment(folder / "venv")
        (folder / "tiny").mkdir()
        (folder / "tiny" / "sitecustomize.py").write_text(TINY.format(root=str(ROOT)))
        self.variables = {
            **os.environ,
            "PATH": f"{folder / 'venv' / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": f"{folder / 'tiny'}:{Path(musubi) / 'src'}",
            "OMP_NUM_THREADS": "1",
            "PIP_NO_INDEX": "1",
        }

    @staticmethod
    def environment(folder: Path) -> Path:
        """All packages of this one but the project, which pip will install; its pip uses the setuptools that is there."""
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        site = next((folder / "lib").glob("python3*")) / "site-packages"
        (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = folder / "bin" / "pip"
        pip.write_text('#!/bin/sh\ncommand=$1; shift\nexec python -m pip "$command" --no-build-isolation "$@"\n')
        pip.chmod(0o755)
        return site

    def run(self, *words: str, **variables: str) -> str:
        given = {**self.variables, **variables}
        done = subprocess.run(words, cwd=self.home, env=given, capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, f"{' '.join(words)}\n{(done.stdout + done.stderr)[-4000:]}"
        return done.stdout + done.stderr


def commands(page: str, heading: str) -> list[Line]:
    """Of the first console block below a heading."""
    text = (ROOT / page).read_text()
    start = text.count("\n", 0, re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE).start())
    return lines(next(block for block in blocks(page) if block.language == "console" and block.line > start))


def follow(newcomer: Newcomer, page: list[Line], family: str, fixture: Path) -> Iterator[tuple[Line, str]]:
    """Runs the commands of a page in their order; yields each with what it printed."""
    for line in page:
        for word, name in (
            (line.words[line.words.index(flag) + 1], flag) for flag in ("--dit", "--vae") if flag in line.words
        ):
            file = (
                weights(fixture, family, "dit", "bf16")
                if name == "--dit"
                else fixture / "weights" / f"{FAMILIES[family].vae}.safetensors"
            )
            shutil.copy(file, newcomer.home / word)
        if "text_encoder" in line.words[1]:
            assert (newcomer.home / line.words[1]).is_file(), "a script of the trainer"
            path = f"{newcomer.variables['PYTHONPATH']}:{ROOT}"
            newcomer.run("python", "-c", TEXTS, family, "dataset.toml", PYTHONPATH=path)
        elif line.words[:2] == ("masked-loss", "edit"):
            open_and_end(line.words, newcomer.variables, newcomer.home)
        else:
            yield line, newcomer.run(*line.words)


@pytest.fixture(scope="module")
def newcomer(musubi, tmp_path_factory) -> Newcomer:
    return Newcomer(tmp_path_factory.mktemp("newcomer"), musubi)


def trained(newcomer: Newcomer, family: str) -> dict[str, str]:
    """What the LoRA of the pages' training commands says of itself."""
    with safe_open(newcomer.home / "output" / "mug.safetensors", "pt") as file:
        assert len(file.keys()) > 10
        said = file.metadata()
    assert said["ss_network_module"] == FAMILIES[family].network
    assert said["ss_use_mask_loss"] == "True"
    assert said["ss_inverted_mask_prior"] == "True"
    assert float(said["ss_inverted_mask_prior_weight"]) == 0.5, "the default, which the pages leave as it is"
    assert (newcomer.home / "output" / "mug_first_items.png").is_file()
    return said


def test_the_readme_leads_from_photos_to_a_masked_lora(newcomer):
    toml = next(block for block in blocks("README.md") if block.language == "toml")
    (newcomer.home / "dataset.toml").write_text(toml.text)
    printed = dict(
        (" ".join(line.words[:2]), text)
        for line, text in follow(
            newcomer, commands("README.md", "From your photos to masked training"), "wan", ensure_fixture()
        )
    )
    installed = {path.name.partition("-")[0] for path in newcomer.site.glob("*.dist-info")}
    assert installed == {"masked_loss_triton"}, "nothing else was installed, nothing was replaced"
    assert "4 masks written" in printed["masked-loss generate"]
    assert "4 masks written" in printed["masked-loss cache"]
    assert "masks are on: " in printed["masked-loss train"]
    assert "masks in 4 caches, from: file 4" in printed["masked-loss train"]
    trained(newcomer, "wan")


@pytest.mark.parametrize(("heading", "family"), [("HunyuanVideo", "hv"), ("Qwen-Image", "qwen")])
def test_a_quick_start_leads_to_a_masked_lora(newcomer, heading, family):
    """After the README's commands, in the same folder: another family's caches in a folder of their own."""
    toml = next(block for block in blocks("README.md") if block.language == "toml").text
    (newcomer.home / "dataset.toml").write_text(toml.replace('"cache"', f'"cache_{family}"'))
    shutil.rmtree(newcomer.home / "output", ignore_errors=True)
    printed = [text for _, text in follow(newcomer, commands("docs/quickstart.md", heading), family, ensure_fixture())]
    assert "masks in 4 caches, from: file 4" in printed[-1]
    trained(newcomer, family)


def test_the_quick_start_of_wan_is_the_readmes():
    readme = commands("README.md", "From your photos to masked training")
    assert commands("docs/quickstart.md", "WAN") == [
        line for line in readme if line.words[0] == "python" or line.words[1] in ("cache", "train")
    ]
