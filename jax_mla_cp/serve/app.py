"""The ASGI application: middleware and routes."""

from __future__ import annotations

from fastapi import FastAPI

from jax_mla_cp.serve import chat, completions, errors, health, status, tokens
from jax_mla_cp.serve.middleware import MiddlewareStack
from jax_mla_cp.serve.openapi import ERRORS
from jax_mla_cp.serve.schemas.responses import ModelCard, ModelList
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.status import Telemetry
from jax_mla_cp.version import package_version


def create_app(
    served: ServedModel, middleware: MiddlewareStack | None = None, telemetry: Telemetry | None = None
) -> FastAPI:
    """Creates the application for a running engine.

    Args:
      middleware: None: the stack with its default settings.
      telemetry: the engine's observer. None: no /metrics, no /status and no status page.
    """
    middleware = middleware or MiddlewareStack()
    app = FastAPI(title="jax_mla_cp", version=package_version(), responses=ERRORS)
    errors.install(app)
    middleware.install(app)
    health.install(app, served, middleware.drain)
    for routes in (completions, chat, tokens):
        routes.install(app, served)
    if telemetry is not None:
        status.install(app, served, telemetry)

    card = ModelCard(id=served.name, created=served.created, max_model_len=served.max_model_len)

    @app.get("/v1/models", summary="List the models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}", summary="Get a model")
    async def model(name: str) -> ModelCard:
        served.check_model_name(name)
        return card

    return app
