"""Liveness, readiness and version, for load balancers and supervisors."""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel, Field

from jax_mla_cp.serve.errors import ApiError, unavailable
from jax_mla_cp.serve.lifecycle import DrainState
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.version import package_version


class DraftAcceptance(BaseModel):
    """Draft tokens of speculative decoding since the start."""

    drafted: int
    accepted: int
    acceptance_rate: float


class Health(BaseModel):
    status: str
    speculation: DraftAcceptance | None = Field(
        default=None, description="Left out if the server runs without speculative decoding."
    )


class Ready(BaseModel):
    status: str


class Version(BaseModel):
    version: str


def install(app: FastAPI, served: ServedModel, drain: DrainState) -> None:
    """Adds the routes. None needs an API key."""

    def check_engine() -> None:
        reason = served.engine.unhealthy_reason
        if reason is not None:
            raise ApiError(503, f"The engine is unhealthy: {reason}", code="engine_dead")

    @app.get("/health", response_model_exclude_none=True, summary="Liveness")
    async def health() -> Health:
        """Returns 503 if the server must be restarted: the engine has given up, or a step hangs."""
        check_engine()
        now = served.engine.status().speculation
        if now is None:
            return Health(status="ok")
        counts = DraftAcceptance(drafted=now.num_drafts, accepted=now.num_accepted, acceptance_rate=now.acceptance_rate)
        return Health(status="ok", speculation=counts)

    @app.get("/ready", summary="Readiness")
    async def ready() -> Ready:
        """Returns 503 if requests should go to another server: this one is unhealthy or shutting down."""
        check_engine()
        if drain.draining:
            raise unavailable("The server is shutting down.", "stopping")
        return Ready(status="ready")

    @app.get("/version", summary="Version of jax_mla_cp")
    async def get_version() -> Version:
        return Version(version=package_version())
