"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from jax_mla_cp.engine import Failed
from jax_mla_cp.serve.schemas.base import FieldError

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


def timed_out(message: str) -> ApiError:
    """A 408. A retry would take as long; OpenAI's clients honor the header that says so."""
    return ApiError(408, message, code="request_timeout", headers={"x-should-retry": "false"})


def failure(event: Failed, constraint: str | None = None) -> ApiError:
    """The error response for a request that the engine failed.

    Args:
      constraint: the request's field that constrains its output.
    """
    kind, message = event.kind, event.message
    if kind == "timeout":
        return timed_out(message)
    if kind == "grammar":
        return ApiError(400, message, param=constraint)
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
        return JSONResponse(invalid_body(error), 400)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = (
                f"{request.method} {ascii(request.url.path)[1:-1]}: {message}. GET /openapi.json lists the routes."
            )
        return JSONResponse(error_body(error.status_code, message), error.status_code, headers=error.headers)


def invalid_body(error: RequestValidationError) -> dict[str, Any]:
    """The error for a body that its schema rejects: the field's full path, expected, and got if that is a single value."""
    first = max(error.errors(), key=lambda each: _progress(each, error.body))
    context = first.get("ctx", {})
    if first["type"] == "json_invalid":
        return error_body(400, f"The body is not valid JSON: {context.get('error', '')}.")
    location = [part for part in first["loc"] if part != "body"]
    cause = context.get("error")
    absent = int(first["type"] == "missing")
    if isinstance(cause, FieldError):
        location += (named := cause.param.split("."))
        absent = len(named)
    if first["type"].startswith("union_tag"):
        location, absent = [*location, "type"], 1
    path = _path(_in_body(location, error.body, absent))
    return error_body(400, f"{path or 'body'}: {_message(first)}.", param=path or None)


def _is_about_type(error: Mapping[str, Any]) -> bool:
    """True if the value has another type than expected; an object in place of one of several strings too."""
    kind: str = error["type"]
    return kind.endswith("_type") or (kind == "literal_error" and isinstance(error["input"], list | dict))


def _progress(error: Mapping[str, Any], body: Any) -> tuple[bool, int, int]:
    """Orders the errors of a field of several types: one that isn't about the type says most; of the others, the one that came
    furthest into the body, and into its lists."""
    parts = _in_body(error["loc"], body)
    last = parts[-1] if parts else 0
    return not _is_about_type(error), len(parts), last if isinstance(last, int) else 0


def _in_body(location: Sequence[int | str], body: Any, absent: int = 0) -> list[int | str]:
    """The parts of a location that lead to a field: pydantic's has the names of a union's types in it, too.

    Args:
      absent: number of parts at the end that the body may lack.
    """
    parts: list[int | str] = []
    value = body
    for i, part in enumerate(location):
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            value = value[part]
        elif isinstance(part, str) and isinstance(value, dict) and (part in value or i >= len(location) - absent):
            value = value.get(part, {})
        else:
            continue
        parts.append(part)
    return parts


def _path(parts: Sequence[int | str]) -> str:
    """A field's path, such as `messages[1].name`."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{ascii(part)[1:-1][:100]}" for part in parts)
    return path.removeprefix(".")


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "not a field of this API, or not supported here; docs/api.md lists the fields"
    if error["type"] == "missing":
        return "is required"
    if error["type"] == "union_tag_not_found":
        return "is required"
    if error["type"].startswith("union_tag"):  # pydantic's text has the whole tag
        return f"must be one of {error['ctx']['expected_tags']}"
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"must be an object, got {_got(error.get('input'))}"
    message: str = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] == "value_error":
        return message
    return f"{message[0].lower()}{message[1:]}, got {_got(error.get('input'))}"


def _got(value: object) -> str:
    """A value in an error: only its type and size if it has parts, which may be the whole conversation."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} with {len(value)} entries"
    shown = (
        {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else None
    )
    text = shown or ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
