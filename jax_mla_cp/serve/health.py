"""Is it alive, does it take requests, which version is it: for balancers and whoever restarts servers."""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel

from jax_mla_cp.serve.errors import ApiError, unavailable
from jax_mla_cp.serve.lifecycle import Drain
from jax_mla_cp.serve.served import Served
from jax_mla_cp.version import package_version


class Acceptance(BaseModel):
    """Drafts of speculative decoding since the start."""

    drafted: int
    accepted: int
    acceptance_rate: float


class Health(BaseModel):
    status: str
    speculation: Acceptance | None = None
    """Left out without speculation."""


class Ready(BaseModel):
    status: str


class Version(BaseModel):
    version: str


def install(app: FastAPI, served: Served, drain: Drain) -> None:
    """The routes; none needs a key."""

    def check_engine() -> None:
        reason = served.engine.unhealthy_reason
        if reason is not None:
            raise ApiError(503, f"No answers can be expected now: {reason}", code="engine_dead")

    @app.get("/health", response_model_exclude_none=True)
    async def health() -> Health:
        """503 when only a new start helps: the engine has given up, or a step hangs."""
        check_engine()
        now = served.engine.status().speculation
        if now is None:
            return Health(status="ok")
        counts = Acceptance(drafted=now.num_drafts, accepted=now.num_accepted, acceptance_rate=now.acceptance_rate)
        return Health(status="ok", speculation=counts)

    @app.get("/ready")
    async def ready() -> Ready:
        """503 when requests should go to another server; so too while it is stopping."""
        check_engine()
        if drain.begun:
            raise unavailable("The server is stopping.", "stopping")
        return Ready(status="ready")

    @app.get("/version")
    async def get_version() -> Version:
        return Version(version=package_version())
