"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jax_mla_cp.engine import Failed

_RETRY_SECONDS = "1"
"""Retry-After: the queue has room as soon as one request finishes."""


class ApiError(Exception):
    """An error response."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = error_body(status, message, param=param, code=code)
        self.headers = headers

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def unavailable(message: str, code: str) -> ApiError:
    """A 503 with Retry-After."""
    return ApiError(503, message, code=code, headers={"retry-after": _RETRY_SECONDS})


def failure(event: Failed) -> ApiError:
    """The error response for a request that the engine failed."""
    kind, message = event.kind, event.message
    if kind == "timeout":
        # A retry would take as long. OpenAI's clients honor the header.
        return ApiError(408, message, code="request_timeout", headers={"x-should-retry": "false"})
    if kind == "grammar":
        return ApiError(400, message, param="response_format")
    if kind in ("queue_timeout", "stopping"):
        return unavailable(message, kind)
    if kind == "dead":
        return ApiError(503, message, code="engine_dead")
    return ApiError(500, message, code="step_failed" if kind == "step" else None)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "not_found_error" if status == 404 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def install(app: FastAPI) -> None:
    """Converts errors to OpenAI's format. Unexpected exceptions are left to `jax_mla_cp.serve.logs.RequestLog`."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # For a field of several types, the most useful error is one that isn't about the type.
        first = min(error.errors(), key=lambda e: e["type"].endswith("_type"))
        field, *inner = [part for part in first["loc"] if part != "body"] or [None]
        where = [str(part) for part in (field, *(i for i in inner if isinstance(i, int))) if part is not None]
        if first["type"] == "json_invalid":
            return JSONResponse(
                error_body(400, f"The body is not valid JSON: {first.get('ctx', {}).get('error', '')}."), 400
            )
        got = ascii(first.get("input"))
        got = got if len(got) <= 100 else got[:100] + "..."
        message = f"{ascii('.'.join(where))[1:-1] or 'body'}: {first['msg']}" + (
            "." if first["type"] == "missing" else f", got {got}."
        )
        return JSONResponse(error_body(400, message, param=ascii(field)[1:-1] if isinstance(field, str) else None), 400)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = (
                f"{request.method} {ascii(request.url.path)[1:-1]}: {message}. GET /openapi.json lists the routes."
            )
        return JSONResponse(error_body(error.status_code, message), error.status_code, headers=error.headers)
