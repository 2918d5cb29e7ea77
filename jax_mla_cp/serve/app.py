"""The routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from jax_mla_cp.serve import errors, health, status
from jax_mla_cp.serve.completions import Job, Served, tokenize
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.guards import Guards
from jax_mla_cp.serve.schemas import Completion, CompletionRequest, Error, ModelCard, ModelList
from jax_mla_cp.serve.status import Telemetry

log = logging.getLogger(__name__)


def create_app(served: Served, guards: Guards | None = None, telemetry: Telemetry | None = None) -> FastAPI:
    """The ASGI application for a running engine. Without `guards`, their defaults; without `telemetry`, no /metrics, no
    /status and no page."""
    guards = guards or Guards()
    codes = (400, 401, 404, 408, 413, 414, 415, 431, 500, 503, 504)
    refusals: dict[int | str, dict[str, Any]] = {code: {"model": Error} for code in codes}
    app = FastAPI(title="jax_mla_cp", version=version("jax-mla-cp"), responses=refusals)
    errors.install(app)
    guards.install(app)
    health.install(app, served, guards.drain)
    if telemetry is not None:
        status.install(app, served, telemetry)

    card = ModelCard(id=served.name, created=served.created, max_model_len=served.max_model_len)

    @app.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        # Tokenizing a long prompt takes a while: not on the event loop.
        prompts = await asyncio.to_thread(tokenize, served, body)
        job = Job(served, body, prompts)
        job.submit()
        if body.stream:
            return StreamingResponse(
                _aborting(job), media_type="text/event-stream", headers={"cache-control": "no-cache"}
            )
        return JSONResponse((await _unless_disconnected(job, request)).model_dump())

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        if name != served.name:
            raise ApiError(404, f"The model {ascii(name)[:100]} does not exist; this server has {served.name!r}.",
                           param="model", code="model_not_found")  # fmt: skip
        return card

    return app


async def _aborting(job: Job) -> AsyncIterator[str]:
    try:
        async for chunk in job.stream():
            yield chunk
    finally:
        job.abort()  # does nothing to what is finished; a client that went away frees its pages


async def _unless_disconnected(job: Job, request: Request) -> Completion:
    """The whole answer, given up as soon as the client is gone."""
    answer = asyncio.ensure_future(job.collect())
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ApiError(499, "The client has disconnected.")
        return answer.result()
    finally:
        job.abort()
        answer.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
