"""The routes."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import FastAPI
from pydantic import BaseModel

from jax_mla_cp.serve import chat, completions, errors, tokens
from jax_mla_cp.serve.errors import ApiError, LimitBody
from jax_mla_cp.serve.openapi import ERRORS
from jax_mla_cp.serve.schemas import ModelCard, ModelList
from jax_mla_cp.serve.served import Served

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


class Version(BaseModel):
    version: str


def create_app(served: Served) -> FastAPI:
    """The ASGI application for a running engine."""
    app = FastAPI(title="jax_mla_cp", version=version("jax-mla-cp"), responses=ERRORS)
    errors.install(app)
    app.add_middleware(LimitBody, limit=_BODY_LIMIT)

    card = ModelCard(id=served.name, created=served.created, max_model_len=served.max_model_len)

    for routes in (completions, chat, tokens):
        routes.install(app, served)

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        served.check_name(name)
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
    async def get_version() -> Version:
        return Version(version=version("jax-mla-cp"))

    return app
