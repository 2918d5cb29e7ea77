"""What stands between a client and the routes, from the outside in."""

from __future__ import annotations

import dataclasses

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from jax_mla_cp.serve.lifecycle import Drain, RefuseNew
from jax_mla_cp.serve.limits import MAX_BODY, LimitRequest
from jax_mla_cp.serve.logs import RequestLog
from jax_mla_cp.serve.security import ApiKeys, RequireKey


@dataclasses.dataclass(frozen=True)
class Guards:
    """The operator's settings for them; the defaults are the server's own."""

    keys: ApiKeys | None = None
    """None: nobody is asked for one."""
    cors_origins: tuple[str, ...] = ()
    max_body: int = MAX_BODY
    """Bytes."""
    log_content: bool = False
    """Requests and answers go to the log."""
    drain: Drain = dataclasses.field(default_factory=Drain)

    def install(self, app: FastAPI) -> None:
        """Starlette puts the last one outermost, so from the inside out."""
        app.add_middleware(LimitRequest, max_body=self.max_body)
        if self.keys is not None:
            app.add_middleware(RequireKey, keys=self.keys)
        app.add_middleware(RefuseNew, drain=self.drain)
        if self.cors_origins:  # outside of the key: a page may read why it is refused
            app.add_middleware(
                CORSMiddleware,
                allow_origins=self.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("authorization", "content-type", "x-request-id"),
                expose_headers=("x-request-id", "retry-after"),
            )
        app.add_middleware(RequestLog, content=self.log_content)
