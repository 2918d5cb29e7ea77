"""What people and Prometheus look at: GET /metrics, GET /status, and the page at / that draws it."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.served import Served
from jax_mla_cp.serve.status.about import About, describe
from jax_mla_cp.serve.status.files import read_files
from jax_mla_cp.serve.status.schemas import Status
from jax_mla_cp.serve.status.telemetry import Telemetry

__all__ = ["About", "Telemetry", "describe", "install"]


def install(app: FastAPI, served: Served, telemetry: Telemetry) -> None:
    """Adds the routes. `telemetry` must be the observer of `served.engine`, or it has nothing to show."""
    engine, files = served.engine, read_files()
    telemetry.metrics.watch(engine.status)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics(request: Request) -> Response:
        """Prometheus's text format, or OpenMetrics if the Accept header asks for it."""
        body, content_type = telemetry.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    @app.get("/status")
    def status(response: Response) -> Status:
        """What the status page shows."""
        response.headers["cache-control"] = "no-store"
        return telemetry.status(engine)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def page(request: Request) -> Response:
        return files["index.html"].response(request)

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    def file(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, f"GET /page/{ascii(name)[1:-1][:100]}: the status page has no such file.")
        return files[name].response(request)
