"""The application: addresses to what answers them.

POST /v1/chat/completions, /v1/completions     GET /v1/models, /v1/models/MODEL
GET  /health, /metrics                         GET /rlkit/profile/MODEL, /rlkit/stats
GET  /, /page/FILE                             the web page
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rlkit.apps.server.endpoints import Endpoints
from rlkit.apps.server.guard import Guard
from rlkit.apps.server.metrics import Metrics
from rlkit.apps.server.pool import Pool
from rlkit.apps.server.refusals import Refusal, failed
from rlkit.apps.server.settings import Settings

NOT_OFFERED = ("embeddings", "audio", "images", "moderations", "files", "fine_tuning", "batches", "responses")


def create_app(settings: Settings, pool: Pool, *, at_once: int = 4) -> FastAPI:
    """The server's application; the pool is closed when it ends. A request runs at most `at_once` replies at a time."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(pool.close)

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    metrics = Metrics()
    _add_routes(app, Endpoints(settings, pool, metrics, at_once))
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _refused)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


async def _refused(request: Request, error: Exception) -> Response:
    """Every error in OpenAI's shape."""
    if isinstance(error, HTTPException):
        error = _unknown(request, error.status_code)
    refusal = failed(error)
    return JSONResponse(refusal.to_json(), refusal.status, refusal.headers)


def _unknown(request: Request, status: int) -> Refusal:
    what = f"{request.method} {request.url.path[:200]}"
    if status == 405:
        return Refusal(405, f"{what} is not how this address is used", code="method_not_allowed")
    part = request.url.path.split("/")
    if part[1:2] == ["v1"] and part[2:3] and part[2] in NOT_OFFERED:
        why = f"/v1/{part[2]} is not offered: this server runs models that write text"
        return Refusal(501, f"{why}; use /v1/chat/completions or /v1/completions", code="not_offered")
    return Refusal(404, f"there is no {what}; see /v1/models and /v1/chat/completions", code="not_found")


def _add_routes(app: FastAPI, endpoints: Endpoints) -> None:
    got: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/v1/models": endpoints.models,
        "/v1/models/{name:path}": endpoints.model,
        "/rlkit/profile/{name:path}": endpoints.profile,
        "/rlkit/stats": endpoints.stats,
        "/health": endpoints.health,
        "/metrics": endpoints.counts,
        "/": endpoints.file,
        "/page/{name:path}": endpoints.file,
    }
    for path, endpoint in got.items():
        app.router.add_route(path, endpoint, methods=["GET"])
    app.router.add_route("/v1/chat/completions", endpoints.chat, methods=["POST"])
    app.router.add_route("/v1/completions", endpoints.completions, methods=["POST"])
