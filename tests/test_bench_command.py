"""`masked-loss bench`: one table and one file, from a library without this repository's bench/."""

import json

import pytest
import torch

from masked_loss_triton import benchmark, masked_loss
from masked_loss_triton.cli import main


def test_one_table_and_one_file(tmp_path, capsys, device):
    out = tmp_path / "mine.json"
    shapes = ["--shape", "1x4x2x6x8", "--shape", "2x4x6x8"]
    assert (
        main(["bench", *shapes, "--dtype", "bfloat16", "--rounds", "3", "--device", device, "--output", str(out)]) == 0
    )
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    report = json.loads(out.read_text())
    assert [row["shape"] for row in report["rows"]] == 2 * [[1, 4, 2, 6, 8]] + 2 * [[2, 4, 6, 8]]
    assert [row["loss"] for row in report["rows"]] == 2 * ["masked_loss", "eager torch"]
    assert report["device"] in " ".join(table[0])
    for row in report["rows"]:
        assert row["milliseconds"] > 0
        assert ["x".join(map(str, row["shape"])), "bfloat16"] in [cells[:2] for cells in table]
        assert (row["host_microseconds"] is None) == (device == "cpu")
    assert report["rows"][1]["times_eager"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one():
    second = torch.device("cuda:1")
    rows = benchmark.measure((1, 4, 2, 6, 8), "float32", second, 3)
    assert torch.cuda.current_device() == 0
    assert all(row.milliseconds > 0 and row.peak_n > 0 for row in rows)


def test_a_device_that_is_not_there_is_one_line(capsys, tmp_path):
    assert main(["bench", "--device", f"cuda:{torch.cuda.device_count()}", "--output", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err.strip()
    assert "cannot be used" in said
    assert len(said.splitlines()) == 1


def test_the_eager_loss_is_the_same_loss():
    pred, target, mask = torch.randn(2, 4, 3, 5, 6), torch.randn(2, 4, 3, 5, 6), torch.rand(2, 1, 3, 5, 6)
    torch.testing.assert_close(benchmark.eager(pred, target, mask), masked_loss(pred, target, mask))
