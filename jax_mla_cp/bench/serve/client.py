"""Sends planned requests at their times and keeps what came back, with the times of it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import resource
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp

from jax_mla_cp.bench.serve.workload import Planned
from jax_mla_cp.config.errors import ConfigError

_ASK_SECONDS = 30
"""For the questions before the load: models, version, tokens."""


@dataclasses.dataclass
class Answer:
    """One request's fate. Times are seconds after the run's start, on the client's monotonic clock."""

    planned: Planned
    sent: float | None = None
    """None: it still waits for its turn."""
    chunks: list[float] = dataclasses.field(default_factory=list)
    """When each chunk with a token came."""
    end: float | None = None
    """When the answer was complete, or had failed."""
    prompt_tokens: int | None = None
    """As the server counts them; None: it doesn't say."""
    cached_tokens: int = 0
    output_tokens: int = 0
    """As the server counts them, else the chunks."""
    finish_reason: str | None = None
    error: str | None = None
    """The kind of failure."""
    message: str = ""
    """What the failure says."""

    @property
    def ok(self) -> bool:
        return self.end is not None and self.error is None

    @property
    def late(self) -> float:
        """Seconds that it was sent after its time."""
        return self._since(self.sent)

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self._since(self.chunks[0])

    @property
    def e2e(self) -> float:
        return self._since(self.end)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies."""
        return [b - a for a, b in itertools.pairwise(self.chunks)]

    @property
    def tpot(self) -> float | None:
        """Mean time per output token after the first; None for a single token."""
        return (self.chunks[-1] - self.chunks[0]) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    def _since(self, moment: float | None) -> float:
        assert moment is not None
        return moment - self.planned.at


class Client:
    """Talks to one server."""

    def __init__(self, base_url: str, *, model: str | None, headers: dict[str, str], timeout: float):
        self.url = base_url.rstrip("/")
        self._root = self.url.removesuffix("/v1")
        self._model = model
        self._headers = headers
        self._timeout = aiohttp.ClientTimeout(total=timeout)

    def _session(self) -> aiohttp.ClientSession:
        # A connection per request: none waits for another's, and none is found closed by the server.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        return aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout)

    async def prepare(self, text: str) -> tuple[list[int] | list[str], dict[str, str]]:
        """Finds the model, and what prompts can be made of.

        Returns: the text as the server's token ids, or as words if it has no /tokenize; and the server's versions.

        Raises:
          ConfigError: no such server or model.
        """
        async with self._session() as session:
            self._model = await self._choose(session, self._model)
            version = await self._try(session, "GET", "/version")
            asked = {"model": self._model, "prompt": text, "add_special_tokens": False}
            tokens = (await self._try(session, "POST", "/tokenize", asked)).get("tokens")
        versions = {key: str(value) for key, value in version.items() if isinstance(value, str)}
        if isinstance(tokens, list) and tokens and all(isinstance(token, int) for token in tokens):
            return tokens, versions
        return text.split(), versions

    @property
    def model(self) -> str | None:
        return self._model

    async def _choose(self, session: aiohttp.ClientSession, name: str | None) -> str:
        try:
            answer = await self._ask(session, "GET", self.url + "/models")
            names = [str(model["id"]) for model in answer["data"]]
        except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                "base_url",
                f"{self.url}: GET /models gives no list of models ({_kind(error)}: {error}). Give the address of an "
                "OpenAI server with its /v1, like http://127.0.0.1:8000/v1, and with `api_key_env` if it wants a key.",
            ) from error
        if name is None and len(names) == 1:
            return names[0]
        if name not in names:
            got = "several models" if name is None else f"no model {name!r}"
            raise ConfigError("model", f"{self.url} has {got}. Use one of {', '.join(names) or 'none'}.")
        return name

    async def _try(self, session: aiohttp.ClientSession, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """What not every server has: the answer, or nothing."""
        try:
            answer = await self._ask(session, method, self._root + path, body)
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return {}
        return answer if isinstance(answer, dict) else {}

    async def _ask(self, session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> Any:
        timeout = aiohttp.ClientTimeout(total=_ASK_SECONDS)
        async with session.request(method, url, json=body, timeout=timeout, raise_for_status=True) as answer:
            return json.loads(await answer.read())

    async def run(self, answers: Sequence[Answer], concurrency: int | None, done: Callable[[Answer], None]) -> None:
        """Sends each request at its time, whatever became of those before it; more than `concurrency` wait, in their order.

        Args:
          answers: one per request, in the order of their times; filled in as they come, so that a run which is
            cancelled leaves what it has.
          done: is told of each answer that is complete or failed.
        """
        # A connection is an open file, of which shells allow 1024: as many as the system does.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        slots = None if concurrency is None else asyncio.Semaphore(concurrency)
        async with self._session() as session, asyncio.TaskGroup() as group:
            start = time.perf_counter()

            async def one(answer: Answer) -> None:
                if slots is None:
                    await self._complete(session, answer, start)
                else:
                    async with slots:
                        await self._complete(session, answer, start)
                done(answer)

            for answer in answers:
                if (wait := answer.planned.at - (time.perf_counter() - start)) > 0:
                    await asyncio.sleep(wait)
                group.create_task(one(answer))

    async def _complete(self, session: aiohttp.ClientSession, answer: Answer, start: float) -> None:
        body = {
            "model": self._model,
            "prompt": answer.planned.prompt,
            "max_tokens": answer.planned.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer.sent = time.perf_counter() - start
        try:
            async with session.post(self.url + "/completions", json=body) as response:
                if response.status != 200:
                    raise _Failure(f"HTTP {response.status}", _reason(await response.text(errors="replace")))
                async for data, moment in _events(response.content):
                    if data == b"[DONE]":
                        break
                    _take(answer, data, moment - start)
            if answer.finish_reason is None:
                raise _Failure("stream cut off", "it ended before a finish_reason")
            if answer.finish_reason not in ("stop", "length"):
                raise _Failure(f"finish_reason {answer.finish_reason}", "an answer ends with stop or length")
            if not answer.chunks:
                raise _Failure("no tokens", "the answer is empty")
        except _Failure as failure:
            answer.error, answer.message = failure.kind, str(failure)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            answer.error, answer.message = _kind(error), str(error)
        answer.end = time.perf_counter() - start


class _Failure(Exception):
    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


def _take(answer: Answer, data: bytes, moment: float) -> None:
    """One event of the stream."""
    text = data.decode(errors="replace")
    try:
        event = json.loads(data)
        choices, usage = event.get("choices") or [], event.get("usage") or {}
        failed = event.get("error") is not None or event.get("object") == "error"
        said = "".join(choice["text"] for choice in choices)
        reason = next((choice["finish_reason"] for choice in choices if choice.get("finish_reason")), None)
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Failure("not a completion", text[:200]) from None
    if failed:
        raise _Failure("error in the stream", _reason(text))
    if choices and (said or reason is None):  # the end alone is no token; a token may have no text of its own yet
        answer.chunks.append(moment)
        answer.output_tokens += 1
    answer.finish_reason = answer.finish_reason or reason
    if usage:
        prompt, output = (count if isinstance(count, int) else None for count in counts)
        answer.prompt_tokens = prompt
        answer.output_tokens = answer.output_tokens if output is None else output
        answer.cached_tokens = cached


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[tuple[bytes, float]]:
    """The data of server-sent events, each with the time at which its bytes were there. OpenAI's are one line each; other
    lines (comments, names) carry nothing."""
    rest = b""
    async for received in content.iter_any():
        moment = time.perf_counter()
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and (data := line[5:].strip()):
                yield data, moment


def _reason(text: str) -> str:
    """The message of an error in OpenAI's shape, or of vLLM's and SGLang's older ones; else the text."""
    try:
        body = json.loads(text)
        text = str(body["error"]["message"] if "error" in body else body["message"])
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300]


def _kind(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, aiohttp.ClientConnectorError):
        return "no connection"
    if isinstance(error, aiohttp.ClientResponseError) and error.status:
        return f"HTTP {error.status}"
    return type(error).__name__
