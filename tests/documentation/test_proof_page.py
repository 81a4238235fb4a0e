"""The numbers of the page about the experiment are those that were measured, and the README's are the page's."""

import csv
import re

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")

from bench.proof import report
from bench.proof.experiments import DEFAULT, EXPERIMENTS, FLOOR, MASK, NO_MASK
from tests.documentation.blocks import ROOT

PAGE = (ROOT / "docs/proof.md").read_text()
ROWS = list(csv.DictReader((ROOT / "bench/results/amd-epyc-1-thread/proof.csv").read_text().splitlines()))


def test_one_commit_measured_all_of_it():
    (commit,) = {row["commit"] for row in ROWS}
    assert not commit.endswith("+"), "measured with changes that no commit has"
    assert {int(row["seed"]) for row in ROWS} == set(range(5))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_tables_are_those_of_the_report(experiment):
    assert "\n".join(report.table(ROWS, experiment)) in PAGE


def test_every_claim_is_there_and_holds_on_every_seed():
    claims = report.judged(ROWS)
    assert "\n".join(claims) in PAGE
    assert all(claim.startswith("- 5 of 5: ") for claim in claims)


def test_the_readme_has_the_same_numbers():
    readme = (ROOT / "README.md").read_text()
    for way in (NO_MASK, MASK, FLOOR, DEFAULT):
        (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {way.title} |") and line.count("|") == 9]
        numbers = [re.match(r"[\d.]*", cell.strip())[0] for cell in line.split("|")[2:-1]]
        inside, drift, _, background, _, _, empty = numbers
        assert f"| {inside} | {drift} | {background} | {empty} |" in readme
