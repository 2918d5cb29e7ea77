"""What /openapi.json says beside the request bodies: every answer that a route can give."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from jax_mla_cp.serve.schemas import Error

Responses = dict[int | str, dict[str, Any]]

ERRORS: Responses = {
    400: {"model": Error, "description": "The request can't be done as it is; `param` names the field."},
    401: {"model": Error, "description": "The server wants an API key: `Authorization: Bearer KEY`."},
    404: {"model": Error, "description": "No such model or path."},
    408: {"model": Error, "description": "The request took, or its body came, longer than the server allows."},
    413: {"model": Error, "description": "The body is too large."},
    414: {"model": Error, "description": "The path and query are too long."},
    415: {"model": Error, "description": "The body is not application/json."},
    431: {"model": Error, "description": "The headers are too many or too large."},
    500: {"model": Error, "description": "The request failed on the server."},
    503: {"model": Error, "description": "Too many requests wait (then with Retry-After), or the engine has stopped."},
    # FastAPI would add its own 422, which this server never sends.
    "default": {"model": Error, "description": "Any other refusal."},
}


def streams(chunk: type[BaseModel]) -> Responses:
    """The 200 of a route that answers in one piece or, with `stream`, in server-sent events.

    OpenAPI before 3.2 has no word for a stream's items; its readers take the schema for that of each event.
    """
    text = f"With `stream`: events `data: {{...}}`, each a {chunk.__name__} or an Error, then `data: [DONE]`."
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {200: {"description": text, "content": {"text/event-stream": {"schema": event}}}}
