"""What the documentation says can be run, and what can be run is documented."""

import dataclasses
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.cli import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "bench/README.md",
    *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]


@pytest.mark.parametrize("module", ["masked_loss_triton", "masked_loss_triton.loss"])
def test_the_examples_in_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


def test_the_loop_of_the_readme_runs():
    code = re.search(r"## In your own loop.*?```python\n(.*?)```", README, re.DOTALL)[1]
    leaf = torch.zeros(1, 16, 3, 4, 4, requires_grad=True)
    names = {
        "transformer": lambda *_: leaf * 2,
        "noisy_latents": None,
        "timestep": None,
        "prompt": None,
        "noise": torch.randn(1, 16, 3, 4, 4),
        "latents": torch.randn(1, 16, 3, 4, 4),
        "mask": torch.rand(1, 32, 32),
    }
    exec(code, names)
    assert leaf.grad.abs().sum() > 0


def test_the_readme_has_every_option_with_its_default_and_every_command():
    for field in dataclasses.fields(MaskedLossConfig):
        assert f"`{field.name}`" in README, field.name
    for command in COMMANDS:
        assert f"masked-loss {command}" in README, command


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    page = ROOT / page
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_tests_that_are_named_exist(page):
    """A path, or a path and a name, or a name alone in the file that was named last."""
    file = None
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::([\w:]+))?`", (ROOT / page).read_text()):
        file = ROOT / path if path else file
        if path or name:
            assert file.is_file(), (path, name)
            assert not name or f"def {name.rpartition('::')[2]}(" in file.read_text(), (file, name)


def test_every_message_that_is_explained_is_one_of_the_program():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    folders = ("masked_loss_triton", "integration")
    source = " ".join(file.read_text() for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    source = re.sub(r'"\s*f?"', "", source)  # messages that go over several lines
    messages = [
        message
        for cell in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", cell)
    ]
    assert len(messages) > 15
    assert [message for message in messages if message not in source] == []


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {path.stem for path in ROOT.glob("docs/*.md")} - {"index"} <= pages
    for file in (tmp_path / "site").rglob("*.html"):
        assert not re.search(r'(src|href)="https?://[^"]+\.(js|css|woff2?)"', file.read_text()), (
            "nothing comes from elsewhere"
        )


def test_float64_asks_for_the_reference():
    pred = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    assert masked_loss(pred, pred, None).dtype == torch.float64
