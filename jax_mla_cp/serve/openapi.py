"""Responses in /openapi.json: errors and event streams."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from jax_mla_cp.serve.schemas.responses import Error

Responses = dict[int | str, dict[str, Any]]

ERRORS: Responses = {
    400: {"model": Error, "description": "The request is invalid. `param` names the field."},
    401: {"model": Error, "description": "The API key is missing or invalid. Send `Authorization: Bearer KEY`."},
    404: {"model": Error, "description": "The model or path does not exist."},
    408: {"model": Error, "description": "The request timed out, or its body arrived too slowly."},
    413: {"model": Error, "description": "The body is too large."},
    414: {"model": Error, "description": "The path and query are too long."},
    415: {"model": Error, "description": "The body is not application/json."},
    431: {"model": Error, "description": "The headers are too many or too large."},
    500: {"model": Error, "description": "The server failed to process the request."},
    503: {
        "model": Error,
        "description": "The waiting queue is full or the server is shutting down (with Retry-After), or the engine has "
        "stopped.",
    },
    # FastAPI would add its own 422, which this server never sends.
    "default": {"model": Error, "description": "Any other error."},
}


def streaming_response(chunk: type[BaseModel]) -> Responses:
    """The 200 response of a route that returns JSON or, with `stream`, server-sent events.

    OpenAPI before 3.2 can't describe the items of a stream; clients take the schema as that of each event.
    """
    text = (
        f"The response. With `stream`: server-sent events `data: {{...}}`, each a {chunk.__name__} or an Error, then "
        "`data: [DONE]`."
    )
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {200: {"description": text, "content": {"text/event-stream": {"schema": event}}}}
