"""The results folder: every row says where it came from, and the plots are drawn."""

import csv

import pytest

pytest.importorskip("matplotlib")

from bench import report
from bench.cases import Case, build
from bench.environment import environment, slug
from bench.plots import is_eager
from bench.suites import loss_row


def measured(loss, part="both", time=1e-3):
    info = dict(case="1x16x21x60x104 fp32", loss=loss, part=part, floor_bytes=3_000_000, bytes_of_pred=1_000_000)
    info |= dict(
        latents="16x21x60x104", dtype="fp32", mask="latent", prior=False, device_type="cpu", peak_bytes=1_000_000
    )
    return loss_row(info, {"min": time, "median": 2 * time, "iqr": 0.0, "rounds": 10})


@pytest.fixture
def results():
    entry = dict(bytes=3.125, launches=3, synchronisations=0, peak=1.0, executed="")
    code = dict(variant="main", kernel="loss_kernel", target="sm_90", registers=64, spills=0, occupancy=0.5)
    return {
        "time": [
            measured("sd-scripts", time=6e-3), measured("blissful", time=4e-3), measured("ours, torch", time=2e-3),
            measured("floor"), measured("copy"), measured("ours, torch", "forward"),
        ],
        "host": [{"case": "1x16x1x26x38 fp32", "loss": "blissful", "forward": 30.0, "both": 80.0}],
        "ledger": [{"name": "ours, triton backend", "case": "1x16x21x60x104 fp32", **entry}],
        "compiled": [code],
        "emulated": [],
    }  # fmt: skip


def test_every_row_has_device_versions_and_commit(results, tmp_path):
    about = environment()
    report.write_report(tmp_path, results, about)
    for name in ("time", "host", "ledger", "compiled"):
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(results[name])
        for row in rows:
            assert {key: row[key] for key in about} == about
            assert all(row[key] for key in ("device", "torch", "commit"))
    assert not (tmp_path / "emulated.csv").exists()


def test_report_shows_its_plots(results, tmp_path):
    report.write_report(tmp_path, results, environment())
    page = (tmp_path / "report.md").read_text()
    for name in ("time", "traffic", "registers"):
        assert f"({name}.png)" in page
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_speed_is_told_beside_the_best_eager_recipe_and_the_floor(results):
    rows = {row["loss"]: row for row in report.with_speed(results["time"])}
    assert rows["ours, torch"]["best eager / this"] == pytest.approx(2.0)
    assert rows["ours, torch"]["this / floor"] == pytest.approx(2.0)
    assert rows["ours, torch"]["gb_per_s"] == pytest.approx(1.5)
    assert [loss for loss in rows if is_eager(loss)] == ["blissful", "sd-scripts"]


def test_folder_names_hold_only_letters_digits_and_hyphens():
    assert slug("NVIDIA H100 80GB HBM3, 16 threads") == "nvidia-h100-80gb-hbm3-16-threads"


def test_unfilled_tensors_of_a_case_look_like_filled_ones():
    for memory in ("contiguous", "channels last", "layered"):
        case = Case(latents="16x1x26x38", memory=memory, prior=True, flow=True, mask="pixels uint8")
        filled, empty = build(case), build(case, "meta", filled=False)
        pairs = [(filled.pred, empty.pred), (filled.mask, empty.mask), (filled.target.latents, empty.target.latents)]
        for one, other in pairs:
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
