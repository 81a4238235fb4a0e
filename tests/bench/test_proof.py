"""`make proof`: what its numbers mean, and that a run that was broken off goes on where it was."""

import csv

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")
pytest.importorskip("skimage")
pytest.importorskip("skvideo")

from bench.proof import __main__ as proof
from bench.proof import data, report
from bench.proof.experiments import DEFAULT, MASK, NO_MASK, painted
from masked_loss_triton.demo import pipeline


def test_painted_is_0_as_in_the_base_1_as_pasted_and_linear_between():
    random = np.random.default_rng(0)
    base, unwanted = random.integers(0, 256, (2, 3, 16, 16, 3)).astype(np.uint8)
    weights = random.random((1, 16, 16))
    half = ((base.astype(int) + unwanted) // 2).astype(np.uint8)
    assert painted(base, base, unwanted, weights) == 0
    assert painted(unwanted, base, unwanted, weights) == pytest.approx(1)
    assert painted(half, base, unwanted, weights) == pytest.approx(0.5, abs=0.01)


def test_painted_does_not_look_beside_the_unwanted():
    base, unwanted = np.zeros((1, 8, 8, 3), np.uint8), np.full((1, 8, 8, 3), 200, np.uint8)
    weights = np.zeros((1, 8, 8))
    weights[:, :4] = 1
    elsewhere = base.copy()
    elsewhere[:, 4:] = 200
    assert painted(elsewhere, base, unwanted, weights) == 0


def test_the_logo_is_where_its_weights_are():
    picture = np.zeros((data.SIDE, data.SIDE, 3), np.uint8)
    marked = data.with_logo(picture).any(axis=2)
    weights = data.logo_weights()
    assert marked[weights == 0].sum() == 0
    assert marked[weights == 1].mean() > 0.95


@pytest.mark.slow
def test_generate_finds_the_logo_on_its_own():
    """White in the masks is what is learned: the logo is not."""
    masks = data.watermarked().masks[:, 0].numpy()
    cells = data.logo_weights().reshape(8, 8, 8, 8).mean(axis=(1, 3))
    assert masks[:, cells > 0.9].max() < 0.1
    assert masks[:, cells == 0].min() > 0.9


def test_the_two_of_a_pair_share_a_picture_and_no_mask():
    pair = data.pair()
    assert pair.names == sorted(data.PAIR)
    assert (pair.latents[0] == pair.latents[1]).all()
    assert (pair.masks[0] * pair.masks[1]).max() == 0
    assert pair.masks.amax(dim=(1, 2, 3)).min() == 1


def rows(seed, **inside):
    return [
        {"seed": str(seed), "experiment": "photographs", "arm": arm, "step": "800", "inside": str(value)}
        | dict.fromkeys(proof.FIELDS[1:], str(value))
        for arm, value in inside.items()
    ]


def test_differences_are_paired_by_seed():
    """The seeds differ by 10, the arms by 1 and 3: the mean difference is 2, and its standard error 1, whatever the seeds do."""
    measured = rows(0, no_mask=1.0, mask=2.0) + rows(1, no_mask=11.0, mask=14.0)
    line = next(line for line in report.table(measured, "photographs") if line.startswith("| mask |"))
    assert line.split("|")[2].strip() == "8.000 (+2.000 ± 1.000)"


@pytest.mark.slow
def test_a_run_that_was_broken_off_goes_on_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "BASE_STEPS", 8)
    monkeypatch.setattr(proof, "ROOT", tmp_path)
    monkeypatch.setitem(proof.STEPS, "pair", 4)
    file = tmp_path / "proof.csv"
    monkeypatch.setattr("sys.argv", ["proof", "--seeds", "3", "--experiments", "pair", "--output", str(file)])
    trained = []
    tune = proof.tuning.tune

    def interrupted(model, subjects, way, *rest):
        if way is MASK and not trained.count(MASK.key):
            trained.append(MASK.key)
            raise KeyboardInterrupt
        trained.append(way.key)
        tune(model, subjects, way, *rest)

    monkeypatch.setattr(proof.tuning, "tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        proof.main()
    proof.main()
    proof.main()
    assert trained == [NO_MASK.key, MASK.key, MASK.key, DEFAULT.key]
    written = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["arm"] for row in written] == ["base", NO_MASK.key, MASK.key, DEFAULT.key]
    # The same numbers from the beginning, in one go.
    again = tmp_path / "again.csv"
    monkeypatch.setattr(proof, "ROOT", tmp_path / "other")
    monkeypatch.setattr("sys.argv", ["proof", "--seeds", "3", "--experiments", "pair", "--output", str(again)])
    proof.main()
    for one, other in zip(written, csv.DictReader(again.read_text().splitlines()), strict=True):
        assert {**one, "cpu_seconds": "", "date": ""} == {**other, "cpu_seconds": "", "date": ""}
