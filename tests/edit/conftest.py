"""One browser for all tests of the page."""

from __future__ import annotations

import pytest

from tests.edit.browser import open_browser


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    driver = open_browser(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()
