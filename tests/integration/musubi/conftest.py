"""Caches with masks, made once for all tests of the trainer, and a trainer's module as it was before each test."""

from __future__ import annotations

import pytest

from tests.integration.musubi import small_trainer
from tests.support.caches import caches


@pytest.fixture(scope="session")
def labs(tmp_path_factory):
    made = {}

    def lab(family: str, masks: str = "disc", stems: str = "abce"):
        key = (family, masks, stems)
        if key not in made:
            made[key] = caches(tmp_path_factory.mktemp("lab"), *key)
        return made[key]

    return lab


@pytest.fixture(autouse=True)
def _metadata_of_one_run(monkeypatch):
    """A process of the inline generation wraps this function, once for its one run; the next test gets it unwrapped."""
    monkeypatch.setattr(small_trainer.sai_model_spec, "build_metadata", small_trainer.sai_model_spec.build_metadata)
