"""The server of the page, on 127.0.0.1 alone: files of the page, pictures and masks, previews, saving.

Every address begins with a token that only the printed address holds, and requests that name another host or come from a
page of another origin are refused: no other page in the browser and no other user of the machine can read or write here.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import io
import json
import secrets
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from masked_loss_triton.cache.inject import Prepared
from masked_loss_triton.edit.clicks import Click, Selector
from masked_loss_triton.edit.entries import Entry
from masked_loss_triton.edit.guard import HEADERS, LARGEST_BODY, Guard, answer_json, bug, not_found, user_error
from masked_loss_triton.edit.library import Library
from masked_loss_triton.edit.survey import Survey
from masked_loss_triton.edit.tasks import Task, carry, write_caches
from masked_loss_triton.edit.weights import flags_of, preview, read_config
from masked_loss_triton.errors import UserError

STATIC = Path(__file__).parent / "static"
THUMB = 192  # pixels


@dataclasses.dataclass(frozen=True)
class Session:
    """Everything one run of the editor works with; `cache_words` is the command line of `masked-loss cache`, without a dataset
    file None."""

    library: Library
    survey: Survey
    selector: Selector
    cache_words: list[str] | None
    problems: list[str]
    prepared: list[Prepared]
    token: str = dataclasses.field(default_factory=lambda: secrets.token_urlsafe(16))
    task: Task = dataclasses.field(default_factory=Task)


def make_app(session: Session) -> Starlette:
    """Returns the application, with all its routes below the session's token."""
    pages = Pages(session)
    routes = [
        Route("/", pages.index),
        Route("/api/items", pages.items),
        Route("/api/news", pages.news),
        Route("/api/picture/{number:int}", pages.picture),
        Route("/api/thumb/{number:int}", pages.thumb),
        Route("/api/mask/{number:int}", pages.mask),
        Route("/api/mask/{number:int}", pages.save, methods=["POST"]),
        Route("/api/preview/{number:int}", pages.preview, methods=["POST"]),
        Route("/api/select/{number:int}", pages.select, methods=["POST"]),
        Route("/api/revert/{number:int}", pages.revert, methods=["POST"]),
        Route("/api/review/{number:int}", pages.review, methods=["POST"]),
        Route("/api/carry/{number:int}", pages.carry, methods=["POST"]),
        Route("/api/cache", pages.cache, methods=["POST"]),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return Starlette(
        routes=[Mount(f"/{session.token}", routes=routes)],
        middleware=[Middleware(Guard)],
        exception_handlers={404: not_found, UserError: user_error, Exception: bug},
    )


class Pages:
    """Answers the requests of the page. Those that are plain functions run in threads, so that none waits for another."""

    def __init__(self, session: Session) -> None:
        self.session, self.library, self.survey = session, session.library, session.survey
        self._thumb = functools.lru_cache(4096)(self._make_thumb)

    def index(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    def items(self, request: Request) -> Response:
        items = [{"name": entry.name, "clip": entry.is_clip} for entry in self.library.entries]
        can_cache = self.session.cache_words is not None
        return answer_json(
            {
                "items": items,
                "labels": list(self.library.labels),
                "problems": self.session.problems,
                "can_cache": can_cache,
            }
        )

    def news(self, request: Request) -> Response:
        found = self.survey.since(_whole(request, "since", 0))
        return answer_json({**found, "task": self.session.task.state()})

    def picture(self, request: Request) -> Response:
        entry, frame = self._entry(request), _whole(request, "frame", 0)
        pixels, data = self.library.picture(entry, frame), io.BytesIO()
        Image.fromarray(pixels).save(data, "JPEG", quality=92)
        headers = {"X-Frames": str(self.library.frame_count(entry))}
        return Response(data.getvalue(), media_type="image/jpeg", headers={**HEADERS, **headers})

    def thumb(self, request: Request) -> Response:
        number = self._number(request)
        paths = [self.library.entry(number, label).mask() for label in ("", *self.library.labels)]
        version = tuple(path.stat().st_mtime_ns for path in paths if path is not None)
        return Response(self._thumb(number, version), media_type="image/jpeg", headers=HEADERS)

    def _make_thumb(self, number: int, version: tuple[int, ...]) -> bytes:
        picture, mask = self.library.picture(self.library.entries[number]), self.library.together(number)
        small = Image.fromarray(picture)
        small.thumbnail((THUMB, THUMB), reducing_gap=2)
        # What is not masked is dark: the picture as the loss sees it. Without a mask it sees all of it.
        weight: Any = np.ones((1, 1), np.float32)
        if mask is not None:
            weight = np.asarray(Image.fromarray(mask).resize(small.size, Image.Resampling.BOX), np.float32) / 255
        shaded = np.asarray(small) * (0.3 + 0.7 * weight[..., None])
        data = io.BytesIO()
        Image.fromarray(shaded.astype(np.uint8)).save(data, "JPEG", quality=80)
        return data.getvalue()

    def mask(self, request: Request) -> Response:
        opened = self.library.mask(self._entry(request), _whole(request, "frame", 0))
        height, width = opened.pixels.shape
        headers = {"X-Version": opened.version, "X-Size": f"{width}x{height}"}
        return Response(opened.pixels.tobytes(), media_type="application/octet-stream", headers={**HEADERS, **headers})

    async def save(self, request: Request) -> Response:
        entry, frame, pixels = self._entry(request), _whole(request, "frame", 0), _pixels(request, await _body(request))
        version = None if request.query_params.get("over") else request.query_params.get("version")
        saved = await _in_thread(self.library.save, entry, pixels, version, frame)
        await _in_thread(self.survey.changed, self._number(request))
        return answer_json({"version": saved})

    async def preview(self, request: Request) -> Response:
        entry, frame, pixels = self._entry(request), _whole(request, "frame", 0), _pixels(request, await _body(request))
        settings = _object(request.query_params.get("settings", "{}"))
        prior = bool(settings.pop("prior", False))
        config = read_config(settings)
        found = await _in_thread(preview, self.library, entry, pixels, config, prior, frame)
        answer = {
            "width": found.cells.shape[1],
            "height": found.cells.shape[0],
            "cells": _base64(found.cells),
            "weights": _base64(found.weights),
            "prior": _base64(found.prior),
            "histogram": found.histogram(),
            "mean": float(found.weights.mean()),
            "bucket": found.bucket,
            "crop": found.crop,
            "cut": found.cut,
            "flags": flags_of(config, prior),
        }
        return answer_json(answer)

    async def select(self, request: Request) -> Response:
        entry, frame, pixels = self._entry(request), _whole(request, "frame", 0), _pixels(request, await _body(request))
        said = _object(request.query_params.get("said", "{}"))
        try:
            clicks = [Click(float(x), float(y), bool(positive)) for x, y, positive in said.get("clicks", [])]
            box = tuple(map(float, said["box"])) if said.get("box") else None
        except (TypeError, ValueError) as error:
            raise UserError("clicks are [x, y, true or false], a box four numbers") from error
        picture = await _in_thread(self.library.picture, entry, frame)
        found, maker = await _in_thread(self.session.selector.select, picture, clicks, box, pixels)
        why = "; ".join(self.session.selector.why_not).encode("ascii", "replace").decode()[:500]
        headers = {"X-Maker": maker, "X-Why": why}
        return Response(found.tobytes(), media_type="application/octet-stream", headers={**HEADERS, **headers})

    def revert(self, request: Request) -> Response:
        entry = self._entry(request)
        if not self.library.revert(entry):
            raise UserError(f"{entry.name} was not saved in this session: there is nothing to bring back")
        self.survey.changed(self._number(request))
        return answer_json({})

    def review(self, request: Request) -> Response:
        self.survey.review(self._number(request), request.query_params.get("mark", ""))
        return answer_json({})

    def carry(self, request: Request) -> Response:
        entry, number = self._entry(request), self._number(request)
        frame, last = _whole(request, "frame", 0), _whole(request, "last", 0)
        count = self.library.frame_count(entry)
        if not entry.is_clip or frame == last or not (0 <= frame < count and 0 <= last < count):
            raise UserError(f"{entry.name} has frames 0 to {count - 1}: carry from one of them to another")
        work = carry(self.library, entry, self.session.selector, frame, last, lambda: self.survey.changed(number))
        self.session.task.start(f"carrying the mask of {entry.name}", abs(last - frame), work)
        return answer_json({})

    def cache(self, request: Request) -> Response:
        if self.session.cache_words is None:
            raise UserError("there are no caches without --dataset_config")
        self.session.task.start("masked-loss cache", 0, write_caches(self.session.cache_words))
        return answer_json({})

    def _number(self, request: Request) -> int:
        return request.path_params["number"]

    def _entry(self, request: Request) -> Entry:
        return self.library.entry(self._number(request), request.query_params.get("label", ""))


def serve(session: Session, port: int, browser: bool = True) -> int:
    """Serves the page until it is interrupted.

    Raises:
        UserError: for a port that is taken.
    """
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(("127.0.0.1", port))
        listening.listen(128)  # now: the address is printed, and may be opened at once
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(f"--port {port} cannot be used ({getattr(error, 'strerror', None) or error})", 2) from error
    address = f"http://127.0.0.1:{listening.getsockname()[1]}/{session.token}/"
    print(f"{len(session.library.entries)} pictures and clips: {address}\nCtrl+C ends it.", flush=True)
    for line in session.problems:
        print(f"masked-loss edit: {line}", file=sys.stderr)
    session.survey.start(functools.partial(_check, session) if session.prepared else None)
    if browser:
        threading.Timer(0.5, webbrowser.open, (address,)).start()
    config = uvicorn.Config(make_app(session), log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again when it has closed everything
        uvicorn.Server(config).run([listening])
    return 0


def _check(session: Session) -> Iterator[tuple[int, str]]:
    """What `masked-loss check` finds, with the number of the picture or clip that each line is about."""
    from masked_loss_triton.cache.kinds import KINDS
    from masked_loss_triton.cache.problems import find_problems

    by_file: dict[str, int] = {}
    for number, entry in enumerate(session.library.entries):
        caches = entry.prepared.items_of(entry.stem) if entry.prepared is not None else []
        for path in (entry.source, entry.target, *entry.masks, *(item.path for item in caches)):
            by_file[str(path)] = number
    for line in find_problems(session.prepared, ignore=("missing", "unmasked", "uncached")).problems:
        if line.file in by_file:
            yield by_file[line.file], f"{line.kind}: {line.message or KINDS[line.kind]}"


async def _in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(function, *arguments)


async def _body(request: Request) -> bytes:
    """The body, read up to what its header says: not more."""
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > LARGEST_BODY:
            raise UserError(f"a request holds at most {LARGEST_BODY} bytes")
        parts.append(part)
    return b"".join(parts)


def _pixels(request: Request, body: bytes) -> np.ndarray:
    """The mask in a request, (H, W) uint8; its size stands in the address."""
    width, height = _whole(request, "width", 0), _whole(request, "height", 0)
    if width < 1 or height < 1 or len(body) != width * height:
        raise UserError(f"a mask of {width}x{height} pixels has {width * height} bytes, got {len(body)}")
    return np.frombuffer(body, np.uint8).reshape(height, width)


def _whole(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, str(default))
    if not text.isdecimal() or len(text) > 9:
        raise UserError(f"{name} must be a whole number, got {text[:40]!r}")
    return int(text)


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    except (ValueError, RecursionError):
        pass
    raise UserError("expected a JSON object")


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
