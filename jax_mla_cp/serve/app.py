"""The routes."""

from __future__ import annotations

from fastapi import FastAPI

from jax_mla_cp.serve import chat, completions, errors, health, status, tokens
from jax_mla_cp.serve.guards import Guards
from jax_mla_cp.serve.openapi import ERRORS
from jax_mla_cp.serve.schemas import ModelCard, ModelList
from jax_mla_cp.serve.served import Served
from jax_mla_cp.serve.status import Telemetry
from jax_mla_cp.version import package_version


def create_app(served: Served, guards: Guards | None = None, telemetry: Telemetry | None = None) -> FastAPI:
    """The ASGI application for a running engine. Without `guards`, their defaults; without `telemetry`, no /metrics, no
    /status and no page."""
    guards = guards or Guards()
    app = FastAPI(title="jax_mla_cp", version=package_version(), responses=ERRORS)
    errors.install(app)
    guards.install(app)
    health.install(app, served, guards.drain)
    for routes in (completions, chat, tokens):
        routes.install(app, served)
    if telemetry is not None:
        status.install(app, served, telemetry)

    card = ModelCard(id=served.name, created=served.created, max_model_len=served.max_model_len)

    @app.get("/v1/models", summary="The models: one")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> ModelCard:
        served.check_name(name)
        return card

    return app
