"""The routes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel

from jax_mla_cp.serve import errors
from jax_mla_cp.serve.completions import Job, Served, tokenize
from jax_mla_cp.serve.errors import ApiError, LimitBody
from jax_mla_cp.serve.schemas import Completion, CompletionRequest, Error, ModelCard, ModelList

log = logging.getLogger(__name__)

_BODY_LIMIT = 16 << 20  # bytes: a prompt of a million token ids, and room


class Acceptance(BaseModel):
    """Drafts of speculative decoding since the start."""

    drafted: int
    accepted: int
    acceptance_rate: float


class Health(BaseModel):
    status: str
    speculation: Acceptance | None = None
    """Left out without speculation."""


def create_app(served: Served) -> FastAPI:
    """The ASGI application for a running engine."""
    refusals: dict[int | str, dict[str, Any]] = {status: {"model": Error} for status in (400, 404, 413, 500, 503)}
    app = FastAPI(title="jax_mla_cp", version=version("jax-mla-cp"), responses=refusals)
    errors.install(app)
    app.add_middleware(LimitBody, limit=_BODY_LIMIT)

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

    @app.get("/health", response_model_exclude_none=True)
    async def health() -> Health:
        if not served.engine.alive:
            raise ApiError(503, "The engine has stopped; the server's log says why.", code="engine_dead")
        now = served.engine.speculation
        if now is None:
            return Health(status="ok")
        counts = Acceptance(drafted=now.drafted, accepted=now.accepted, acceptance_rate=now.acceptance_rate)
        return Health(status="ok", speculation=counts)

    @app.get("/version")
    async def get_version() -> dict[str, str]:
        return {"version": version("jax-mla-cp")}

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
