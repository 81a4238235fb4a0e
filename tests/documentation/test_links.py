"""Links of the README and of docs/ lead to a file and a heading that exist; links out of the repository have the form of one."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

import pytest

from tests.documentation.blocks import PAGES, ROOT, without_blocks

ALL = [*PAGES, "CHANGELOG.md"]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: str) -> set[str]:
    """Of the page's headings, as forges and the site make them: small letters, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", without_blocks(page), re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)).lower() for heading in headings)
    return {re.sub(r"\s", "-", heading.strip()) for heading in plain}


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page):
    for target in LINK.findall(without_blocks(page)):
        if re.match(r"\w+:", target):
            address = urlsplit(target)
            assert address.scheme == "https", f"{target}: https"
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", address.netloc), target
            assert not target.endswith((".", ",", ";")), target
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        file = file.resolve()
        assert file.is_relative_to(ROOT), f"{target}: outside of the repository"
        if anchor:
            assert anchor in anchors(str(file.relative_to(ROOT))), target


def test_the_site_has_no_link_that_only_the_repository_has():
    """A page of docs/ that links to another by ../docs/ would lose the link on the site."""
    for page in PAGES:
        if page.startswith("docs/"):
            assert [target for target in LINK.findall(without_blocks(page)) if target.startswith("../docs/")] == [], (
                page
            )


def test_links_and_headings_are_found():
    assert len([target for page in ALL for target in LINK.findall(without_blocks(page))]) > 100
    assert "labels-face-15-body-07-logo-nothing" in anchors("docs/caches.md")
    assert "is-it-working" in anchors("docs/musubi.md")


@pytest.mark.parametrize("page", [page for page in ALL if page.startswith("docs/") or page == "README.md"])
def test_no_measured_number_without_its_command(page):
    """A section whose table has several decimal numbers names, in backticks, what makes them, or links to the page that does."""
    for section in re.split(r"^## ", without_blocks(page), flags=re.MULTILINE):
        cells = [cell for row in re.findall(r"^ *\|(.+)\|$", section, re.MULTILINE) for cell in row.split("|")]
        measured = [cell for cell in cells if re.fullmatch(r"[\s*+±-]*\d[\d,]*\.\d\d+[\s*]*", cell)]
        if len(measured) > 3:
            command = r"`[^`]*(?:make \w|python -m |masked-loss \w|tests/\w|pytest)[^`]*`"
            assert re.search(command, section), f"{page}: {section.splitlines()[0]}"
