"""Monitoring routes: GET /metrics for Prometheus, GET /status as JSON, and the status page at /."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response

from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.status.schemas import Status
from jax_mla_cp.serve.status.server_info import ServerInfo, server_info
from jax_mla_cp.serve.status.static_files import load_static_files
from jax_mla_cp.serve.status.telemetry import Telemetry

__all__ = ["ServerInfo", "Telemetry", "install", "server_info"]


def install(app: FastAPI, served: ServedModel, telemetry: Telemetry) -> None:
    """Adds the routes. `telemetry` must be the observer of `served.engine`."""
    engine, files = served.engine, load_static_files()
    telemetry.metrics.add_status(engine.status)

    @app.get("/metrics", response_class=PlainTextResponse, summary="Prometheus metrics")
    def metrics(request: Request) -> Response:
        """Returns Prometheus's text format, or OpenMetrics if the Accept header asks for it."""
        body, content_type = telemetry.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    @app.get("/status", summary="Server status")
    def status(response: Response) -> Status:
        """Returns the data of the status page."""
        response.headers["cache-control"] = "no-store"
        return telemetry.status(engine)

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def page(request: Request) -> Response:
        return files["index.html"].response(request)

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    def file(name: str, request: Request) -> Response:
        if name not in files:
            raise ApiError(404, f"GET /page/{ascii(name)[1:-1][:100]}: not a file of the status page.")
        return files[name].response(request)
