"""Every code block of the README and of docs/ runs, or says why it cannot."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from masked_loss_triton.cache.dataset import load_datasets
from masked_loss_triton.cli import main
from tests.documentation.blocks import FENCE, INDENTED, LANGUAGES, PAGES, ROOT, Block, Line, blocks, lines, read
from tests.documentation.stand_ins import STAND_INS, furnish, open_and_end, stand_in, write_caches

WITH_COMMANDS = [page for page in PAGES if any(block.language in ("console", "toml") for block in blocks(page))]
RUN = [f"docs/{name}.md" for name in ("index", "quickstart", "settings", "masks", "edit", "caches", "machines")] + [
    "README.md"
]
PYTHON = [block for page in PAGES for block in blocks(page) if block.language == "python"]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page):
    assert read(page).count("```") == 2 * len(FENCE.findall(read(page))), "a fence is not closed"
    assert [str(block) for block in blocks(page) if block.language not in LANGUAGES] == []
    assert [found["text"] for found in INDENTED.finditer(FENCE.sub("", read(page)))] == [], "fence it, with a language"


def test_blocks_are_found():
    """So that a page cannot hide its blocks from the tests by another way to write them."""
    found = [block for page in PAGES for block in blocks(page)]
    assert len([block for block in found if block.language == "console"]) > 20
    assert len(PYTHON) > 8
    assert set(RUN) <= set(WITH_COMMANDS)


def without_speed(text: str) -> str:
    return re.sub(r" \(\d[\d.]* (images|items)/s\)", "", text).strip()


def shards(line: Line) -> list[Line]:
    """The line, and where its comment says "and 1/3, 2/3", the lines of the other shards."""
    others = re.findall(r"\d/\d", line.comment)
    first = next((word for word in line.words if re.fullmatch(r"\d/\d", word)), None)
    if first is None or not others:
        return [line]
    changed = [
        Line(
            tuple(other if word == first else word for word in line.words),
            "",
            line.into.replace(first[0], other[0]),
            (),
        )
        for other in others
    ]
    return [line, *changed]


def run(line: Line, block: Block) -> None:
    assert line.words[0] == "masked-loss", f"{block}: {line.command}: nothing runs it, and nothing stands in for it"
    if line.words[1] == "edit":
        command = [sys.executable, "-m", "masked_loss_triton", *line.words[1:]]
        open_and_end(command, {**os.environ, "PYTHONPATH": str(ROOT)})
        return
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(line.words[1:]))
    assert status == 0, f"{block}: {line.command}\n{out.getvalue()}{err.getvalue()}"
    if line.into:
        Path(line.into).write_text(out.getvalue())
    printed = {without_speed(text) for text in (out.getvalue() + err.getvalue()).splitlines()}
    assert {without_speed(text) for text in line.output} - printed == set(), f"{block}: {line.command}\n{printed}"


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_run(page, tmp_path, monkeypatch):
    """In a folder as a user has it, in the order of the page."""
    given = [block for block in blocks(page) if not block.reason]
    commands = [line for block in given if block.language == "console" for line in lines(block)]
    made = any(line.command.startswith("masked-loss generate") and not stand_in(line.command) for line in commands)
    furnish(tmp_path / "home", masks=not made)
    monkeypatch.chdir(tmp_path / "home")
    cached = any(re.match(r"python \w*cache_latents", line.command) for line in commands)
    if not cached:
        write_caches(("python", "wan_cache_latents.py", "--dataset_config", "dataset.toml"))
    ran = 0
    for block in given:
        if block.language == "toml":
            named = re.match(r"# (\S+\.toml)", block.text)
            small = re.sub(r"resolution = \[512, 512\]", "resolution = [128, 128]", block.text)
            path = Path(named[1] if named else "hv/dataset.toml" if "hv/" in block.text else "dataset.toml")
            path.write_text(small)
        for line in [shard for one in (lines(block) if block.language == "console" else ()) for shard in shards(one)]:
            found = stand_in(line.command)
            if found:
                found[1](list(line.words))
            else:
                run(line, block)
                ran += 1
    assert ran or page not in RUN


def test_every_reason_is_needed():
    """A rule that no command meets would hide one that is written later."""
    commands = [
        line.command for page in PAGES for block in blocks(page) if block.language == "console" for line in lines(block)
    ]
    for pattern, reason, _ in STAND_INS:
        assert any(re.search(pattern, command) for command in commands), (pattern, reason)


def names() -> dict[str, object]:
    """What a training loop has at hand where the page's lines begin."""
    from model_families import FAMILIES, tiny_transformer

    torch.manual_seed(0)
    pred = torch.zeros(1, 16, 3, 4, 4, requires_grad=True)
    return {
        "transformer": lambda *_, **__: pred * 2,
        "tiny": lambda: tiny_transformer(FAMILIES["wan"]),
        "leaf": pred,
        "noisy_latents": None,
        "timestep": torch.tensor([500.0]),
        "prompt": None,
        "noise": torch.randn(1, 16, 3, 4, 4),
        "latents": torch.randn(1, 16, 3, 4, 4),
        "mask": torch.rand(1, 32, 32),
    }


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block):
    if block.reason:
        compile(block.text, str(block), "exec")
        return
    given = names()
    if "routed(" in block.text:
        transformer = given["tiny"]()
        width = transformer.config.text_dim
        given |= {
            "transformer": transformer.train(),
            "noisy": torch.randn(1, 16, 3, 4, 4),
            "text": torch.randn(1, 5, width),
        }
        given |= {"mask": (torch.rand(1, 1, 3, 4, 4) > 0.7).float(), "seed": 0, "step": 1}
    exec(block.text, given)
    assert torch.isfinite(given["loss"])
    assert given["leaf"].grad is not None or "routed(" in block.text


def test_datasets_of_the_pages_are_read(tmp_path, monkeypatch):
    """Every TOML block is a dataset file that the trainer's own reader, or ours, takes."""
    monkeypatch.chdir(tmp_path)
    found = [block for page in PAGES for block in blocks(page) if block.language == "toml"]
    assert len(found) > 3
    for number, block in enumerate(found):
        path = tmp_path / f"{number}.toml"
        path.write_text(block.text)
        assert load_datasets(path), str(block)
