"""An asynchronous client for OpenAI-compatible servers: this project's own, vLLM's, SGLang's."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from types import TracebackType
from typing import Any, Self

import aiohttp

_QUERY_SECONDS = 30
"""Limit for requests that generate nothing: models, version, tokens."""


class RequestError(RuntimeError):
    """A request that failed. The message is fit for the user."""

    def __init__(self, kind: str, message: str, *, status: int | None = None):
        super().__init__(message)
        self.kind = kind
        """Groups failures: "HTTP 503", "timeout", "no connection", or the name of the exception."""
        self.status = status
        """The HTTP status, if the server answered with another one than 200."""


class RequestTimeout(RequestError):
    """The server did not answer in time."""

    def __init__(self, seconds: float):
        super().__init__("timeout", f"no answer within {seconds:g} seconds")


class ModelNotFound(ValueError):
    """The server doesn't have the model, or has several to choose from."""


class OpenAIClient:
    """Talks to one server, within `async with`. Nothing is sent twice.

    Every request has a connection of its own: none waits for another's, and none is found closed by the server.
    """

    def __init__(
        self, base_url: str, *, timeout: float, headers: dict[str, str] | None = None, trust_env: bool = False
    ):
        """
        Args:
          base_url: with its /v1.
          timeout: seconds for one completion, from sending to the last byte.
          trust_env: use the environment's proxies (HTTP_PROXY, NO_PROXY).
        """
        self.url = base_url.rstrip("/")
        self._root = self.url.removesuffix("/v1")
        self._timeout = timeout
        self._headers = headers
        self._trust_env = trust_env

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True), headers=self._headers, trust_env=self._trust_env
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def choose_model(self, name: str | None) -> str:
        """The model `name`, or the server's only one if it is None.

        Raises:
          RequestError: the server has no list of models.
          ModelNotFound: it doesn't have this model, or has several.
        """
        answer = await self._request("GET", f"{self.url}/models", None, _QUERY_SECONDS)
        try:
            names = [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError):
            raise RequestError("unexpected answer", "GET /models has no list of models") from None
        if name is None and len(names) == 1:
            return names[0]
        if name is None or name not in names:
            found = "several models" if name is None else f"no model {name!r}"
            raise ModelNotFound(f"{self.url} has {found}. Use one of {', '.join(names) or 'none'}.")
        return name

    async def versions(self) -> dict[str, str]:
        """The answer of GET /version; empty if the server has no such endpoint."""
        answer = await self._request_if_supported("GET", "/version")
        return {key: value for key, value in answer.items() if isinstance(value, str)}

    async def tokenize(self, model: str, text: str) -> list[int] | None:
        """Token ids from POST /tokenize; None if the server has no such endpoint."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        tokens = (await self._request_if_supported("POST", "/tokenize", body)).get("tokens")
        if isinstance(tokens, list) and tokens and all(isinstance(token, int) for token in tokens):
            return tokens
        return None

    async def complete(self, body: dict[str, Any]) -> Any:
        """POST /completions: the JSON of the answer.

        Raises:
          RequestError: no answer, another status than 200, or no JSON.
        """
        return await self._request("POST", f"{self.url}/completions", body, self._timeout)

    async def stream(self, body: dict[str, Any]) -> AsyncGenerator[tuple[float, bytes], None]:
        """POST /completions with `"stream": true`: its server-sent events, up to [DONE].

        Close it (`contextlib.aclosing`) where it may not be read to its end.

        Yields: for each event, `time.perf_counter()` when its last byte had arrived, and its data.

        Raises:
          RequestError: no answer, or another status than 200.
        """
        with _request_errors(self._timeout):
            async with self._session.post(
                f"{self.url}/completions", json=body, timeout=aiohttp.ClientTimeout(total=self._timeout)
            ) as response:
                if response.status != 200:
                    raise _status_error(response.status, await response.text(errors="replace"))
                async for moment, data in _events(response.content):
                    if data == b"[DONE]":
                        return
                    yield moment, data

    async def _request_if_supported(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The answer of an endpoint that not every server has; empty if there is none."""
        try:
            answer = await self._request(method, self._root + path, body, _QUERY_SECONDS)
        except RequestError:
            return {}
        return answer if isinstance(answer, dict) else {}

    async def _request(self, method: str, url: str, body: Any, seconds: float) -> Any:
        timeout = aiohttp.ClientTimeout(total=seconds)
        with _request_errors(seconds):
            async with self._session.request(method, url, json=body, timeout=timeout) as response:
                answer = await response.read()
        if response.status != 200:
            raise _status_error(response.status, answer.decode(errors="replace"))
        try:
            return json.loads(answer)
        except ValueError:
            path = url.removeprefix(self.url)
            raise RequestError("not JSON", f"{method} {path} is answered by something that is not JSON") from None


def error_message(text: str) -> str:
    """The message of an error in OpenAI's shape, or of vLLM's and SGLang's older ones; else the text. At most 300 characters."""
    try:
        body = json.loads(text)
        text = str(body["error"]["message"] if "error" in body else body["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300]


def _status_error(status: int, text: str) -> RequestError:
    return RequestError(f"HTTP {status}", error_message(text), status=status)


@contextlib.contextmanager
def _request_errors(seconds: float) -> Iterator[None]:
    """Turns aiohttp's exceptions into `RequestError`."""
    try:
        yield
    except TimeoutError as error:
        raise RequestTimeout(seconds) from error
    except aiohttp.ClientConnectorError as error:
        raise RequestError("no connection", str(error)) from error
    except (aiohttp.ClientError, OSError) as error:
        raise RequestError(type(error).__name__, str(error)) from error


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[float, bytes]]:
    """Times and data of server-sent events. OpenAI's are one line each; other lines (comments, names) carry nothing."""
    rest = b""
    async for received in content.iter_any():
        moment = time.perf_counter()
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()):
                yield moment, data
