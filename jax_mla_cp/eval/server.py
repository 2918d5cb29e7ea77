"""The evaluation's backend for a running server: OpenAI's completions API, as vLLM, SGLang and this project serve it."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from jax_mla_cp.client.openai import ModelNotFound, OpenAIClient, RequestError, RequestTimeout
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.eval.backend import BackendError, PromptLogprobsUnsupported
from jax_mla_cp.eval.corpus import PasskeyPrompt
from jax_mla_cp.tokenizer import Tokenizer

_CONCURRENCY = 4
"""Requests at a time: enough to keep a server busy, few enough for each to be answered in time."""
_BAD_REQUEST = (400, 422)


class ServerBackend:
    """Implements `jax_mla_cp.eval.backend.Backend`. Prompts go as text, and nothing is sent twice."""

    def __init__(self, base_url: str, tokenizer: Tokenizer, *, model: str | None, timeout: float):
        """Asks the server for its models.

        Args:
          base_url: with its /v1.
          tokenizer: the one that the prompts were made with.
          model: a model of the server; None: its only one.
          timeout: seconds for one completion.

        Raises:
          ConfigError: no such server or model.
        """
        self._client = OpenAIClient(base_url, timeout=timeout, trust_env=True)
        self._tokenizer = tokenizer
        self._timeout = timeout
        self._model = asyncio.run(self._choose_model(model))

    async def _choose_model(self, name: str | None) -> str:
        url = self._client.url
        try:
            async with self._client:
                return await self._client.choose_model(name)
        except RequestError as error:
            raise ConfigError(
                "base_url",
                f"{url}: {_describe(error, 'GET /models')}. Give the address of an OpenAI server with its /v1, "
                "like http://127.0.0.1:8000/v1.",
            ) from error
        except ModelNotFound as error:
            raise ConfigError("served_model_name", str(error)) from error

    def metadata(self) -> dict[str, Any]:
        return {"model": self._model, "server": self._client.url, "device": None, "mesh": None, "versions": {}}

    def generate(
        self, prompts: Sequence[PasskeyPrompt], max_tokens: int, on_done: Callable[[int, int, str], None]
    ) -> None:
        async def one(index: int) -> None:
            answer = await self._complete(prompts[index].tokens, max_tokens=max_tokens)
            on_done(index, _field(answer, int, "usage", "prompt_tokens"), _field(answer, str, "choices", 0, "text"))

        asyncio.run(self._run([functools.partial(one, index) for index in range(len(prompts))]))

    def prompt_logprobs(self, windows: Sequence[Sequence[int]], on_done: Callable[[], None]) -> list[float]:
        """The prompt's own log-probabilities come with `echo`. One token is generated, because not every server takes 0."""
        found: list[float] = []

        async def one(window: Sequence[int]) -> None:
            try:
                answer = await self._complete(window, max_tokens=1, echo=True, logprobs=1)
            except _BadRequest as error:
                raise PromptLogprobsUnsupported(
                    f"the server gives no log-probabilities of a prompt's tokens: {error}"
                ) from error
            count = _field(answer, int, "usage", "prompt_tokens")
            # Nothing comes before the first token; after the prompt's comes the one that was generated.
            values = _field(answer, list, "choices", 0, "logprobs", "token_logprobs")[1:count]
            if len(values) != count - 1 or not all(isinstance(value, float | int) for value in values):
                raise PromptLogprobsUnsupported(
                    "the server answered echo=true without log-probabilities of the prompt's tokens"
                )
            found.extend(map(float, values))
            on_done()

        asyncio.run(self._run([functools.partial(one, window) for window in windows]))
        return found

    async def _run(self, tasks: Sequence[Callable[[], Coroutine[Any, Any, None]]]) -> None:
        """Runs the tasks, a few at a time, in their order. The first that fails cancels the others."""
        waiting = iter(tasks)

        async def worker() -> None:
            for task in waiting:
                await task()

        try:
            async with self._client, asyncio.TaskGroup() as group:
                for _ in range(_CONCURRENCY):
                    group.create_task(worker())
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def _complete(self, tokens: Sequence[int], **parameters: Any) -> Any:
        """The answer's JSON.

        Raises:
          _BadRequest: the server doesn't take the parameters.
          BackendError: any other failure.
        """
        prompt = self._tokenizer.decode(tokens)
        try:
            return await self._client.complete({"model": self._model, "prompt": prompt, "temperature": 0, **parameters})
        except RequestTimeout as error:
            raise BackendError(f"no answer within --timeout {self._timeout:g} seconds") from error
        except RequestError as error:
            kind = _BadRequest if error.status in _BAD_REQUEST else BackendError
            raise kind(_describe(error, "POST /completions")) from error


class _BadRequest(BackendError):
    """The server doesn't take a request's parameters."""


def _describe(error: RequestError, request: str) -> str:
    if error.status is not None:
        return f"{request} gives status {error.status}: {error}"
    return f"{error.kind}: {error}"


def _field(answer: Any, kind: type, *path: str | int) -> Any:
    """A field of an answer.

    Raises:
      BackendError: it is not there, or has another type.
    """
    value = answer
    try:
        for key in path:
            value = value[key]
    except (KeyError, IndexError, TypeError):
        value = None
    if not isinstance(value, kind):
        where = ".".join(map(str, path))
        raise BackendError(f"the answer has no {where}: this is not an OpenAI completions server")
    return value
