"""The report folder is whole or not there, and never replaces what is not a report."""

import json
from pathlib import Path

import pytest

from masked_loss_triton.demo.output import MADE_BY, REPORT, check_output, complete_folder
from masked_loss_triton.errors import UserError


def make_report(folder: Path) -> None:
    folder.mkdir()
    (folder / REPORT).write_text(json.dumps({"made_by": MADE_BY}))
    (folder / "old.txt").write_text("old")


def write(output: Path) -> None:
    with complete_folder(check_output(output)) as folder:
        (folder / "new.txt").write_text("new")


def write_half(output: Path) -> None:
    with complete_folder(check_output(output)) as folder:
        (folder / "half.txt").write_text("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_folder_is_written(tmp_path, exists):
    output = tmp_path / "parent" / "report"
    if exists:
        output.mkdir(parents=True)
    write(output)
    assert (output / "new.txt").read_text() == "new"
    assert [path.name for path in output.parent.iterdir()] == ["report"]


def test_a_former_report_is_replaced_as_a_whole(tmp_path):
    make_report(tmp_path / "report")
    write(tmp_path / "report")
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["new.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("content", [None, "not json", '{"made_by": "somebody"}', "[]"])
def test_another_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path, content):
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter.txt").write_text("years of work")
    if content is not None:
        (output / REPORT).write_text(content)
    with pytest.raises(UserError, match="not empty and not a former report"):
        write(output)
    assert (output / "chapter.txt").read_text() == "years of work"


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "report").write_text("")
    with pytest.raises(UserError, match="a file of that name"):
        write(tmp_path / "report")


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write(tmp_path / "file" / "report")


@pytest.mark.parametrize("former", [False, True])
def test_a_run_that_fails_leaves_everything_as_it_was(tmp_path, former):
    output = tmp_path / "report"
    if former:
        make_report(output)
    with pytest.raises(KeyboardInterrupt):
        write_half(output)
    assert [path.name for path in tmp_path.iterdir()] == (["report"] if former else [])
    if former:
        assert (output / "old.txt").read_text() == "old"
