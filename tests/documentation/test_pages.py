"""What the pages say is so: options, commands, messages, tests that are named, versions; and the site is built."""

import dataclasses
import doctest
import importlib
import os
import re
import subprocess
import sys

import pytest
import torch

import masked_loss_triton
from masked_loss_triton import MaskedLossConfig, masked_loss
from masked_loss_triton.cli import COMMANDS
from tests.documentation.blocks import PAGES, ROOT, blocks, lines, read

README = read("README.md")


@pytest.mark.parametrize("module", ["masked_loss_triton", "masked_loss_triton.loss"])
def test_the_examples_in_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.attempted > 0
    assert results.failed == 0


def test_every_option_with_its_default_and_every_command_is_told():
    rows = re.findall(
        r"^\| (`.+?) \| (.+?) \|", read("docs/api.md").split("## Options")[1].split("## ")[0], re.MULTILINE
    )
    told = {
        name: default.strip()
        for names, defaults in rows
        for name, default in zip(re.findall(r"`(\w+)`", names), defaults.split(", "), strict=True)
    }
    config = MaskedLossConfig()
    for field in dataclasses.fields(MaskedLossConfig):
        value = getattr(config, field.name)
        shown = "off" if value is None else f'`"{value}"`' if isinstance(value, str) else f"`{value}`"
        assert told.pop(field.name, None) == shown.replace("1e-08", "1e-8"), field.name
    assert told == {}
    page = read("docs/commands.md")
    assert {name for name in re.findall(r"^\| `masked-loss ([\w-]+)`", page, re.MULTILINE)} == COMMANDS.keys()


def test_the_readme_is_short_and_says_what_was_not_run():
    assert len(README.splitlines()) < 200
    assert "On a GPU: never." in README[: README.index("## From")]


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)[1]
    assert version == masked_loss_triton.__version__
    assert re.findall(r"^## (.+)$", read("CHANGELOG.md"), re.MULTILINE)[0] in (version, "Unreleased")
    assert f"## {version}\n" in read("CHANGELOG.md")


def test_the_package_is_installed_from_a_checkout_until_it_is_released():
    """No page but the one that says so tells pip the bare name, which an index does not have yet, or has of somebody else."""
    named = [
        (page, line.command)
        for page in PAGES
        for block in blocks(page)
        if block.language == "console"
        for line in lines(block)
        if line.words[:2] == ("pip", "install") and re.search(r"(^| )masked_loss_triton", line.command)
    ]
    assert {page for page, _ in named} == {"docs/install.md"}
    assert "## After a release" in read("docs/install.md")


def test_the_release_checks_the_version_of_its_tag():
    steps = re.findall(r"run: (.+)", read(".github/workflows/release.yml"))
    version = masked_loss_triton.__version__
    for tag, status in ((f"v{version}", 0), ("v9.9.9", 1)):
        environment = {**os.environ, "GITHUB_REF_NAME": tag}
        checks = [step for step in steps if step.startswith("grep")]
        found = [subprocess.run(["bash", "-c", step], cwd=ROOT, env=environment, check=False) for step in checks]
        assert [one.returncode for one in found] == [status] * 2
    assert "make dist" in steps


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
