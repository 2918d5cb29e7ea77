"""A running server as what is evaluated: OpenAI's completions API, as vLLM, SGLang and this project serve it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import httpx

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.eval.prompts import Prompt
from jax_mla_cp.eval.target import CannotScore, TargetError
from jax_mla_cp.tokenizer import Tokenizer

_AT_A_TIME = 4
"""Requests that wait for an answer: enough to keep a server busy, few enough for each to be answered in time."""


class Server:
    """Implements `jax_mla_cp.eval.target.Target`. Prompts go as text, and nothing is asked twice."""

    def __init__(self, base_url: str, tokenizer: Tokenizer, *, name: str | None, timeout: float):
        """Asks the server for its models.

        Args:
          base_url: with its /v1.
          tokenizer: the one that the prompts were made with.
          name: of the model, which the server must have; None: the only one that it has.

        Raises:
          ConfigError: no such server or model.
        """
        self._url = base_url.rstrip("/")
        self._tokenizer = tokenizer
        self._timeout = httpx.Timeout(timeout, connect=10)
        self._seconds = timeout
        self._name = self._choose(name)

    def _choose(self, name: str | None) -> str:
        try:
            names = [str(model["id"]) for model in asyncio.run(self._ask_one("GET", "/models"))["data"]]
        except (TargetError, KeyError, TypeError) as error:
            reason = error if isinstance(error, TargetError) else "GET /models has no list of models"
            raise ConfigError(
                "base_url",
                f"{self._url}: {reason}. Give the address of an OpenAI server with its /v1, like "
                "http://127.0.0.1:8000/v1.",
            ) from error
        if name is None and len(names) == 1:
            return names[0]
        if name is None or name not in names:
            got = "several models" if name is None else f"no model {name!r}"
            raise ConfigError("served_model_name", f"{self._url} has {got}. Use one of {', '.join(names) or 'none'}.")
        return name

    def facts(self) -> dict[str, Any]:
        return {"model": self._name, "server": self._url, "device": None, "mesh": None, "versions": {}}

    def answer(self, prompts: Sequence[Prompt], max_tokens: int, done: Callable[[int, int, str], None]) -> None:
        async def one(index: int, client: httpx.AsyncClient) -> None:
            text = self._tokenizer.decode(prompts[index].tokens)
            answer = await self._complete(client, text, max_tokens=max_tokens)
            done(index, _field(answer, int, "usage", "prompt_tokens"), _field(answer, str, "choices", 0, "text"))

        asyncio.run(self._all([functools.partial(one, index) for index in range(len(prompts))]))

    def logprobs(self, windows: Sequence[Sequence[int]], done: Callable[[], None]) -> list[float]:
        """The prompt's own log-probabilities come with `echo`. One token is generated, because not every server takes 0."""
        found: list[float] = []

        async def one(window: Sequence[int], client: httpx.AsyncClient) -> None:
            text = self._tokenizer.decode(window)
            try:
                answer = await self._complete(client, text, max_tokens=1, echo=True, logprobs=1)
            except _Refused as error:
                raise CannotScore(f"the server gives no log-probabilities of a prompt's tokens: {error}") from error
            count = _field(answer, int, "usage", "prompt_tokens")
            values = _field(answer, list, "choices", 0, "logprobs", "token_logprobs")[
                1:count
            ]  # before the first is nothing
            if len(values) != count - 1 or not all(isinstance(value, float | int) for value in values):
                raise CannotScore("the server answered echo=true without log-probabilities of the prompt's tokens")
            found.extend(map(float, values))
            done()

        asyncio.run(self._all([functools.partial(one, window) for window in windows]))
        return found

    async def _all(self, tasks: Sequence[Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]]) -> None:
        """Runs them, a few at a time, in their order; the first that fails ends the others."""
        waiting = iter(tasks)

        async def worker() -> None:
            for task in waiting:
                await task(client)

        try:
            async with httpx.AsyncClient(timeout=self._timeout) as client, asyncio.TaskGroup() as group:
                for _ in range(_AT_A_TIME):
                    group.create_task(worker())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _complete(self, client: httpx.AsyncClient, prompt: str, **how: Any) -> Any:
        return await self._ask(
            client, "POST", "/completions", {"model": self._name, "prompt": prompt, "temperature": 0, **how}
        )

    async def _ask_one(self, method: str, path: str) -> Any:
        async with httpx.AsyncClient(timeout=self._timeout) as client:
            return await self._ask(client, method, path)

    async def _ask(self, client: httpx.AsyncClient, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON.

        Raises:
          _Refused: status 400 or 422.
          TargetError: any other failure.
        """
        try:
            answer = await client.request(method, self._url + path, json=body)
        except httpx.ConnectError as error:
            raise TargetError(f"nothing answers there ({error})") from error
        except httpx.TimeoutException as error:
            raise TargetError(f"no answer within --timeout {self._seconds:g} seconds") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TargetError(f"the connection failed ({type(error).__name__}: {error})") from error
        if answer.status_code != 200:
            kind = _Refused if answer.status_code in (400, 422) else TargetError
            raise kind(f"{method} {path} gives status {answer.status_code}: {_reason(answer)}")
        try:
            return answer.json()
        except ValueError as error:
            raise TargetError(f"{method} {path} is answered by something that is not JSON") from error


class _Refused(TargetError):
    """The server doesn't take the request as it is."""


def _reason(answer: httpx.Response) -> str:
    """The message of an error in OpenAI's shape, or of vLLM's and SGLang's older ones; else the text."""
    text = answer.text
    try:
        body = answer.json()
        text = str(body["error"]["message"] if "error" in body else body["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300]


def _field(answer: Any, kind: type, *path: str | int) -> Any:
    """A field of an answer.

    Raises:
      TargetError: it is not there, or is something else.
    """
    value = answer
    try:
        for key in path:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        value = None
    if not isinstance(value, kind):
        where = ".".join(map(str, path))
        raise TargetError(f"the answer has no {where}: this is not an OpenAI completions server")
    return value
