"""Open-loop load generator: sends planned requests at their times and records when each token arrives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import time
from collections.abc import Callable, Sequence

from jax_mla_cp.bench.serve.request_result import RequestResult
from jax_mla_cp.client.openai import ModelNotFound, OpenAIClient, RequestError, error_message
from jax_mla_cp.config.errors import ConfigError


class LoadGenerator:
    """Puts load on one server."""

    def __init__(self, base_url: str, *, model: str | None, headers: dict[str, str], timeout: float):
        """
        Args:
          base_url: with its /v1.
          model: a model of the server; None: its only one.
          timeout: seconds for one answer.
        """
        self._client = OpenAIClient(base_url, headers=headers, timeout=timeout)
        self.model = model

    @property
    def url(self) -> str:
        return self._client.url

    async def prepare(self, text: str) -> tuple[list[int] | list[str], dict[str, str]]:
        """Chooses the model and tokenizes the text that prompts are cut from.

        Returns: the text as the server's token ids, or as words if it has no /tokenize; and the server's versions.

        Raises:
          ConfigError: no such server or model.
        """
        async with self._client as client:
            try:
                self.model = await client.choose_model(self.model)
            except RequestError as error:
                raise ConfigError(
                    "base_url",
                    f"{self.url}: GET /models gives no list of models ({error.kind}: {error}). Give the address of an "
                    "OpenAI server with its /v1, like http://127.0.0.1:8000/v1, and with `api_key_env` if it wants a key.",
                ) from error
            except ModelNotFound as error:
                raise ConfigError("model", str(error)) from error
            versions = await client.versions()
            tokens = await client.tokenize(self.model, text)
        return text.split() if tokens is None else tokens, versions

    async def run(
        self, results: Sequence[RequestResult], concurrency: int | None, on_done: Callable[[RequestResult], None]
    ) -> None:
        """Sends each request at its time, independently of the earlier ones' answers.

        Args:
          results: one per request, in the order of their times; filled in while the run goes on, so that a cancelled run
            keeps what it has.
          concurrency: maximum number of requests at the server; the others wait, in their order. None: no limit.
          on_done: called with each request that is complete or has failed.
        """
        # A connection is an open file, of which shells allow 1024: raise the limit to the system's.
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        slots = contextlib.nullcontext() if concurrency is None else asyncio.Semaphore(concurrency)
        async with self._client as client, asyncio.TaskGroup() as group:
            start = time.perf_counter()

            async def send(result: RequestResult) -> None:
                async with slots:
                    await self._send(client, result, start)
                on_done(result)

            for result in results:
                if (wait := result.planned.at - (time.perf_counter() - start)) > 0:
                    await asyncio.sleep(wait)
                group.create_task(send(result))

    async def _send(self, client: OpenAIClient, result: RequestResult, start: float) -> None:
        body = {
            "model": self.model,
            "prompt": result.planned.prompt,
            "max_tokens": result.planned.output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        result.sent = time.perf_counter() - start
        try:
            async with contextlib.aclosing(client.stream(body)) as events:
                async for moment, data in events:
                    _record(result, data, moment - start)
            if result.finish_reason is None:
                raise RequestError("stream cut off", "it ended before a finish_reason")
            if result.finish_reason not in ("stop", "length"):
                raise RequestError(f"finish_reason {result.finish_reason}", "an answer ends with stop or length")
            if not result.chunks:
                raise RequestError("no tokens", "the answer is empty")
        except RequestError as error:
            result.error, result.message = error.kind, str(error)
        result.end = time.perf_counter() - start


def _record(result: RequestResult, data: bytes, moment: float) -> None:
    """Adds one event of the stream to the result.

    Raises:
      RequestError: the event is an error, or no chunk of a completion.
    """
    text = data.decode(errors="replace")
    try:
        event = json.loads(data)
        choices, usage = event.get("choices") or [], event.get("usage") or {}
        failed = event.get("error") is not None or event.get("object") == "error"
        new_text = "".join(choice["text"] for choice in choices)
        reason = next((choice["finish_reason"] for choice in choices if choice.get("finish_reason")), None)
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RequestError("not a completion", text[:200]) from None
    if failed:
        raise RequestError("error in the stream", error_message(text))
    # A finish_reason without text is no token; a chunk without either is a token whose text is not complete yet.
    if choices and (new_text or reason is None):
        result.chunks.append(moment)
        result.output_tokens += 1
    result.finish_reason = result.finish_reason or reason
    if usage:
        prompt, output = (count if isinstance(count, int) else None for count in counts)
        result.prompt_tokens = prompt
        result.output_tokens = result.output_tokens if output is None else output
        result.cached_tokens = cached
