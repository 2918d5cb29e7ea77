"""The middleware stack: request log, discarding of unread bodies, CORS, drain, API keys and request size limits, from the outside in."""

from __future__ import annotations

import dataclasses

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from jax_mla_cp.serve.discard_body import DiscardBody
from jax_mla_cp.serve.lifecycle import DrainState, RejectWhileDraining
from jax_mla_cp.serve.limits import MAX_BODY, LimitRequestSize
from jax_mla_cp.serve.logs import RequestLog
from jax_mla_cp.serve.security import ApiKeys, RequireApiKey


@dataclasses.dataclass(frozen=True)
class MiddlewareStack:
    """The operator's settings for the middleware."""

    keys: ApiKeys | None = None
    """None: no API key is required."""
    cors_origins: tuple[str, ...] = ()
    max_body: int = MAX_BODY
    """Bytes."""
    log_content: bool = False
    """Log the content of requests and responses."""
    drain: DrainState = dataclasses.field(default_factory=DrainState)

    def install(self, app: FastAPI) -> None:
        """Adds the middleware from the inside out: Starlette makes the last one the outermost."""
        app.add_middleware(LimitRequestSize, max_body=self.max_body)
        if self.keys is not None:
            app.add_middleware(RequireApiKey, keys=self.keys)
        app.add_middleware(RejectWhileDraining, drain=self.drain)
        if self.cors_origins:  # outside of the key check, so that a web page can read why it was rejected
            app.add_middleware(
                CORSMiddleware,
                allow_origins=self.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),  # OpenAI's client sends a dozen of its own
                expose_headers=("x-request-id", "retry-after"),
            )
        app.add_middleware(DiscardBody)
        app.add_middleware(RequestLog, content=self.log_content)
