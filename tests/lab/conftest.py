"""The lab: the real trainers, tiny, on a CPU. One variable, MUSUBI_REPO, names a checkout of kohya-ss/musubi-tuner (v0.3.4).

    MUSUBI_REPO=/path/to/musubi-tuner python -m pytest tests/lab

BLISSFUL_REPO and MUSUBI_02_REPO, checkouts of blissful-tuner and of a musubi-tuner 0.2, add the older layouts. What the trainers
need: pip install 'masked_loss_triton[lab]'. The first run makes the fixture, two minutes. CI has no checkout: the tests are skipped
there, and small_trainer.py and the expectations stored in tests/cache take their place.
"""

from __future__ import annotations

import os

import pytest

from tests.lab.fixture import ensure_fixture
from tests.lab.laboratory import Laboratory


@pytest.fixture(scope="session")
def musubi() -> str:
    """The checkout; skips the test where there is none."""
    if not os.environ.get("MUSUBI_REPO"):
        pytest.skip("needs a checkout of musubi-tuner in MUSUBI_REPO")
    return os.environ["MUSUBI_REPO"]


@pytest.fixture(scope="session")
def laboratory(musubi, tmp_path_factory):
    return Laboratory(tmp_path_factory.mktemp("laboratory"), ensure_fixture())
