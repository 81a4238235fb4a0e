"""A folder of pictures, masks and caches for each test."""

from __future__ import annotations

import pytest

from tests.cache.support import Lab


@pytest.fixture
def lab(tmp_path):
    return Lab(tmp_path)
