"""What the server of the editor answers to requests that do not come from its own page, and how it says that something is wrong."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from masked_loss_triton.edit.library import Changed
from masked_loss_triton.edit.tasks import Busy

HOSTS = ("127.0.0.1", "localhost", "[::1]")  # a tunnel's end may have another port
LARGEST_BODY = 2**27  # bytes: the largest picture that is decoded, one byte a pixel
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; style-src 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Guard:
    """Refuses what does not come from the page itself: another host, another origin, a body that is too large."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        host = request.headers.get("host", "")
        refused: Response | None = None
        if _host_name(host) not in HOSTS:
            refused = say(f"this page answers as {' or '.join(HOSTS)} only, not as {host[:100]!r}", 421)
        elif _is_foreign(request, host):
            refused = say("requests of other pages are refused", 403)
        elif request.method == "POST" and not _length(request) <= LARGEST_BODY:
            refused = say(f"a request holds at most {LARGEST_BODY} bytes, and says how many", 413)
        await (refused or self.app)(scope, receive, send)


def _is_foreign(request: Request, host: str) -> bool:
    """Whether a request comes from the page of another address, as far as the browser says so."""
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    return (origin is not None and urlsplit(origin).netloc != host) or site not in ("none", "same-origin")


def _length(request: Request) -> float:
    text = request.headers.get("content-length", "")
    return int(text) if text.isdecimal() else float("inf")


def _host_name(host: str) -> str:
    return host if host.endswith("]") else host.rpartition(":")[0] or host


def answer_json(content: Any) -> Response:
    """Answers with JSON."""
    return JSONResponse(content, headers=HEADERS)


def say(text: str, status: int) -> Response:
    """Answers with one line about what is wrong."""
    return JSONResponse({"error": text}, status, headers=HEADERS)


def not_found(request: Request, error: Exception) -> Response:
    """Answers what is no address of the page."""
    return say("not here: open the address that masked-loss edit printed", 404)


def user_error(request: Request, error: Exception) -> Response:
    """Answers what is wrong with a request or a file."""
    return say(str(error), 409 if isinstance(error, (Changed, Busy)) else 422)


def bug(request: Request, error: Exception) -> Response:
    """Answers what nobody foresaw."""
    return say(f"{type(error).__name__}: {error}: please report this", 500)
