"""What a user's mistake prints: one line, and an exit status that says whose mistake it was."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from masked_loss_triton import errors
from masked_loss_triton.cli import COMMANDS, EXTRAS, RENAMED, build_parser, explain, renamed
from masked_loss_triton.errors import install_command

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def masked_loss_command(*arguments, cwd=None):
    command = [sys.executable, "-m", "masked_loss_triton", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = masked_loss_command(command, "--help")
    assert result.returncode == 0
    assert f"Example:\n  masked-loss {command}" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "required: COMMAND"),
        (["train-everything"], 2, "invalid choice: 'train-everything'"),
        (["demo", "--steps", "0"], 2, "--steps must be a whole number from 1"),
        (["cache", "--dataset_config", "nowhere.toml", "--arch", "wan"], 2, "nowhere.toml cannot be read"),
        (["check", "--dataset_config", "x.toml", "--arch", "wan", "--workers", "-3"], 2, "must be 1 or more, got -3"),
        (
            ["generate", "--imges", "photos", "--masks", "masks"],
            2,
            "required: --images; --imges is unknown; did you mean --images?",
        ),
        (["demo", "--qick"], 2, "unknown argument --qick; did you mean --quick?"),
        (["bench", "--shape", "1x16"], 2, "--shape must be BxCxFxHxW or BxCxHxW"),
        (["bench", "--device", "tpu"], 2, "--device tpu cannot be used"),
        (["bench", "--output", "nowhere/bench.json"], 2, "there is no folder nowhere"),
        (["to-alpha", "--images", "nowhere", "--masks", "nowhere", "--output", "out"], 2, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(tmp_path, arguments, status, text):
    result = masked_loss_command(*arguments, cwd=tmp_path)
    assert result.returncode == status
    assert text in result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    """A file stands where a folder is needed."""
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "data.toml").write_text(
        '[general]\nresolution = [64, 64]\n[[datasets]]\nimage_directory = "photos"\ncache_directory = "cache"\n'
    )
    (tmp_path / "taken").write_text("a file")
    result = masked_loss_command(
        "inspect",
        "--dataset_config",
        "data.toml",
        "--arch",
        "wan",
        "--alpha_mask",
        "--output",
        "taken/sheet",
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "taken" in result.stderr


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    code = f"{sys.executable} -m masked_loss_triton --help | head -c 1; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "Traceback" not in result.stderr


def test_a_missing_package_is_told_with_the_extra_that_has_it():
    with open(Path(__file__).parents[1] / "pyproject.toml", "rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    distributions = {"skimage": "scikit-image", "sklearn": "scikit-learn"}
    for package, extra in EXTRAS.items():
        name = distributions.get(package, package)
        assert name in [Requirement(text).name for text in extras[extra]], package
        message, status = explain(ModuleNotFoundError(f"No module named '{package}.x'", name=f"{package}.x"))
        assert (f"needs the package '{package}': {install_command(extra)}", 2) == (message, status)
    assert explain(ModuleNotFoundError("x", name="easydict")) == ("needs the package 'easydict': install it", 2)


@pytest.mark.parametrize(
    ("noted", "source"),
    [
        (None, "masked_loss_triton"),
        ('{"url": "file:///home/me/masked%20loss", "dir_info": {"editable": true}}', "/home/me/masked loss"),
        ('{"url": "file:///tmp/masked_loss_triton-0.2.0-py3-none-any.whl"}', "masked_loss_triton"),
        ('{"url": "https://example.org/x.git", "vcs_info": {}}', "masked_loss_triton"),
        ("broken", "masked_loss_triton"),
    ],
)
def test_an_extra_is_installed_from_where_the_package_came_from(monkeypatch, noted, source):
    """What pip notes for an index, a checkout, a wheel, a repository, and a note that cannot be read."""

    class Distribution:
        def read_text(self, name):
            return noted if name == "direct_url.json" else None

    assert install_command("demo") == f"pip install '{Path(__file__).parents[1]}[demo]'"  # of this checkout, in place
    monkeypatch.setattr(errors, "__file__", "/site-packages/masked_loss_triton/errors.py")
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Distribution())
    assert install_command("demo") == f"pip install '{source}[demo]'"


def test_a_bug_of_ours_is_no_message():
    assert explain(ModuleNotFoundError("x", name="masked_loss_triton.lost")) is None
    assert explain(ImportError("cannot import name 'x'")) is None
    assert explain(ZeroDivisionError()) is None


def test_flags_that_were_renamed_are_understood_and_told(capsys):
    commands = build_parser().commands.choices
    for command, names in RENAMED.items():
        flags = commands[command]._option_string_actions
        assert set(names.values()) <= flags.keys()
        assert not names.keys() & flags.keys()
    words = ["--debug", "generate", "--input_dir", "a b", "--output_dir=masks", "--select", "all"]
    assert renamed(words) == ["--debug", "generate", "--images", "a b", "--masks=masks", "--select", "all"]
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "masked-loss generate: --input_dir is called --images now",
        "masked-loss generate: --output_dir is called --masks now",
    ]
    foreign = ["cache", "--mask_directory", "m", "--encode", "--mask_directory", "theirs"]
    assert renamed(foreign) == ["cache", "--masks", "m", "--encode", "--mask_directory", "theirs"]


def test_a_flag_takes_the_same_in_every_command():
    seen = {}
    for command, parser in build_parser().commands.choices.items():
        for flag, action in parser._option_string_actions.items():
            assert seen.setdefault(flag, action.nargs) == action.nargs, (command, flag)
