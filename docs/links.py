"""Fits the pages of the repository into the site, which has those of docs/ alone.

Links out of docs/ become plain names. A page that only points to a file at the top of the repository (`POINTERS`) becomes
that file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
POINTERS = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def on_page_content(html: str, **_: Any) -> str:
    """Marks short names and flags, which the style sheet keeps on one line: browsers break after a hyphen."""
    return re.sub(r"<code>(?=[^<]{1,30}</code>)", '<code class="short">', html)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in POINTERS:
        markdown = (ROOT / POINTERS[page.file.src_uri]).read_text(encoding="utf-8").replace("](docs/", "](")
    return OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2]}` in the repository)", markdown)
