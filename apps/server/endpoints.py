"""What answers each address."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from rlkit.apps.server import about, bodies, chat, completions, page
from rlkit.apps.server.answer import Answer
from rlkit.apps.server.answering import Answering, Plan
from rlkit.apps.server.asking import Target
from rlkit.apps.server.metrics import Metrics
from rlkit.apps.server.pool import Pool, Served
from rlkit.apps.server.refusals import Refusal
from rlkit.apps.server.schemas import ChatBody, Common, CompletionBody, parse
from rlkit.apps.server.settings import Settings

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
QUICK_NBYTES = 16_384  # a body up to this is encoded at once; more would keep other streams waiting

Body = TypeVar("Body", bound=Common)
Planner = Callable[[Body, Target, Settings], Plan]


class Endpoints:
    """One method each; a request runs at most `at_once` replies at a time."""

    def __init__(self, settings: Settings, pool: Pool, metrics: Metrics, at_once: int) -> None:
        self.settings, self.pool, self.metrics, self.at_once = settings, pool, metrics, at_once
        self._files = page.read_files()

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate(request, ChatBody, chat.plan)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._generate(request, CompletionBody, completions.plan)

    async def models(self, _request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse(about.models(self.pool))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/MODEL."""
        return JSONResponse(about.model(self.pool, request.path_params["name"]))

    async def profile(self, request: Request) -> Response:
        """GET /rlkit/profile/MODEL."""
        name = request.path_params["name"]
        return JSONResponse(await asyncio.to_thread(about.profile, self.pool, self.metrics, name))

    async def stats(self, _request: Request) -> Response:
        """GET /rlkit/stats."""
        return JSONResponse(about.stats(self.pool, self.metrics))

    async def health(self, _request: Request) -> Response:
        """GET /health."""
        return JSONResponse({"status": "ok"})

    async def counts(self, _request: Request) -> Response:
        """GET /metrics."""
        nbytes = {loaded.name: loaded.nbytes for loaded in self.pool.loaded()}
        return PlainTextResponse(self.metrics.render(self.pool.stats(), nbytes), media_type=METRICS_TYPE)

    async def file(self, request: Request) -> Response:
        """GET / and /page/FILE."""
        return page.answer(self._files, request.path_params.get("name", page.INDEX))

    async def _generate(self, request: Request, kind: type[Body], planner: Planner[Body]) -> Response:
        """Answer a request for text."""
        began = time.perf_counter()
        found = await bodies.read_object(request, self.settings)
        body = parse(kind, found)
        name, adapter = self.pool.resolve(body.model)
        quick = int(request.headers.get("content-length", QUICK_NBYTES + 1)) <= QUICK_NBYTES

        async def parts() -> AsyncGenerator[bytes, None]:
            async with self._lease(name) as loaded:
                target = Target(body.model or name, loaded, adapter)
                make = partial(planner, body, target, self.settings)
                plan = make() if quick else await asyncio.to_thread(make)
                answering = Answering(plan, self.at_once, began)
                async with contextlib.aclosing(answering.stream() if body.stream else answering.whole()) as made:
                    try:
                        async for part in made:
                            yield part
                    except ValueError as error:
                        raise Refusal(400, loaded.without_paths(str(error))) from error
                if answering.timings is not None:
                    self.metrics.replied(name, answering.timings)

        return Answer(parts, stream=bool(body.stream), left=self.metrics.left)

    @contextlib.asynccontextmanager
    async def _lease(self, name: str) -> AsyncIterator[Served]:
        """An open bundle for as long as the block lasts."""
        loaded = self.pool.take(name)
        if loaded is None:
            opening = asyncio.ensure_future(asyncio.to_thread(self.pool.open, name))
            try:
                loaded = await asyncio.shield(opening)
            except asyncio.CancelledError:  # the client left; the bundle goes on opening, and is idle then
                opening.add_done_callback(self._unused)
                raise
        try:
            yield loaded
        finally:
            self.pool.give_back(loaded)

    def _unused(self, opening: asyncio.Future[Served]) -> None:
        if not opening.cancelled() and opening.exception() is None:
            self.pool.give_back(opening.result())
