"""Turns links out of docs/ into plain names: the site has the pages of docs/ alone, the repository has all of them."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2]}` in the repository)", markdown)
