"""One HTTP request from its prompts to its answer: what completions and chat have in common."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol, TypedDict

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from jax_mla_cp.engine import (
    EngineDead,
    Event,
    Failed,
    Finished,
    Grammar,
    PromptLogprobs,
    QueueFull,
    Request,
    SamplingParams,
    Token,
)
from jax_mla_cp.engine.logits_processor import LogitsProcessor
from jax_mla_cp.engine.text import TextStream
from jax_mla_cp.serve import logs
from jax_mla_cp.serve.errors import ApiError, failure, unavailable
from jax_mla_cp.serve.fields import Generation
from jax_mla_cp.serve.schemas import PromptTokensDetails, Usage
from jax_mla_cp.serve.served import Served

Good = PromptLogprobs | Token | Finished


class Head(TypedDict):
    """The fields that every answer and every chunk begins with."""

    id: str
    created: int
    model: str


def new_head(prefix: str, model: str) -> Head:
    return Head(id=f"{prefix}-{secrets.token_hex(12)}", created=int(time.time()), model=model)


class Form(Protocol):
    """The events of a request's choices as one API writes them. Choice i is of prompt `i // n`."""

    head: Head

    @property
    def prompts(self) -> Sequence[list[int]]:
        """Token ids of each."""

    def grammar(self, prompt: int) -> Grammar | None:
        """What an answer to this prompt has to follow, each time a new one."""

    def opening(self) -> Sequence[BaseModel]:
        """Chunks that a stream begins with."""

    def chunk(self, index: int, event: Good) -> BaseModel | None:
        """An event as a chunk of choice `index`; None: nothing to say."""

    def last_chunk(self, usage: Usage) -> BaseModel:
        """The chunk without choices that tells the usage."""

    def whole(self, events: Sequence[Sequence[Good]], usage: Usage) -> BaseModel:
        """An answer that is no stream, from each choice's events."""


class Job:
    """A request to the engine per choice, and the events of all of them in one queue."""

    def __init__(self, served: Served, body: Generation, form: Form, loop: asyncio.AbstractEventLoop):
        self._served = served
        self._body = body
        self._form = form
        self._loop = loop
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._n = body.n or 1
        seed = body.seed if body.seed is not None else served.seed
        self._requests = [
            self._request(at * self._n + i, at, secrets.randbits(64) if seed is None else (seed + i) % 2**64)
            for at in range(len(form.prompts))
            for i in range(self._n)
        ]
        self._sampled = 0
        self._cached = 0
        self._log = logs.current()

    def _request(self, index: int, at: int, seed: int) -> Request:
        body, served, prompt = self._body, self._served, self._form.prompts[at]
        own_ends = () if body.ignore_eos else served.eos_token_ids
        stop_tokens = frozenset([*own_ends, *(body.stop_token_ids or ())])
        limit, min_tokens = body.limit(), body.min_tokens or 0
        return Request(
            prompt=prompt,
            max_tokens=served.max_model_len - len(prompt) if limit is None else limit,
            sampling=SamplingParams(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                top_k=max(body.top_k or 0, 0),
                seed=seed,
                min_p=body.min_p or 0.0,
            ),
            stop_tokens=stop_tokens,
            text=TextStream(served.tokenizer, body.stops()),
            emit=lambda event: self._deliver(index, event),
            id=f"{self._form.head['id']}-{index}",  # each its own: the status page draws them by it
            min_tokens=min_tokens,
            logits_processor=_logits_processor(body, prompt, stop_tokens),
            grammar=self._form.grammar(at),
            prompt_logprobs=body.scores_prompt(),
            cache_salt=body.cache_salt or "",
            queue_timeout=served.queue_timeout,
            timeout=served.request_timeout,
        )

    def _deliver(self, index: int, event: Event) -> None:
        """On the engine's thread. The event loop may be gone, when the server is stopping."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def submit(self) -> None:
        """Hands all requests to the engine, or none.

        Raises:
          ApiError: 503, the queue is full or the engine takes no requests; 400, one is longer than the cache.
        """
        try:
            self._served.engine.submit_all(self._requests)
        except QueueFull as error:
            raise unavailable(f"The server is busy: {error}", "queue_full") from error
        except EngineDead as error:
            raise ApiError(503, f"The server takes no requests: {error}", code="engine_dead") from error
        except ValueError as error:
            raise ApiError(400, str(error), param="max_tokens", code="context_length_exceeded") from error

    def abort(self) -> None:
        """Drops what is not finished; its pages are free within a step."""
        for request in self._requests:
            self._served.engine.abort(request)

    async def events(self) -> AsyncIterator[tuple[int, Good]]:
        """All events, until every choice is finished.

        Raises:
          ApiError: the engine gave one up.
        """
        left = len(self._requests)
        while left:
            index, event = await self._events.get()
            self._log.take(index, self._requests[index], event)
            if isinstance(event, Failed):
                raise failure(event)
            if isinstance(event, Token):
                self._sampled += 1
            elif isinstance(event, Finished):
                left -= 1
                if index % self._n == 0:  # a prompt is counted once, whatever the number of its choices
                    self._cached += event.cached_tokens
            yield index, event

    def usage(self) -> Usage:
        prompt = sum(map(len, self._form.prompts))
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self._sampled,
            total_tokens=prompt + self._sampled,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached),
        )

    async def collect(self) -> str:
        """The whole answer's JSON.

        Raises:
          ApiError: as `events`.
        """
        found: dict[int, list[Good]] = defaultdict(list)
        async for index, event in self.events():
            found[index].append(event)
        events = [found[index] for index in range(len(self._requests))]
        # Log-probabilities of a long prompt take a while to write: not on the event loop.
        return await asyncio.to_thread(lambda: self._form.whole(events, self.usage()).model_dump_json())

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: a chunk per event, usage if asked for, [DONE]; or an error."""
        try:
            for chunk in self._form.opening():
                yield _sse(chunk)
            async for index, event in self.events():
                if isinstance(event, PromptLogprobs):
                    said = await asyncio.to_thread(self._form.chunk, index, event)
                else:
                    said = self._form.chunk(index, event)
                if said is not None:
                    yield _sse(said)
            if self._body.stream_options and self._body.stream_options.include_usage:
                yield _sse(self._form.last_chunk(self.usage()))
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
        yield "data: [DONE]\n\n"


async def respond(served: Served, body: Generation, make: Callable[[], Form], http: HttpRequest) -> Response:
    """Answers a request.

    Args:
      make: tokenizes and checks; takes long, so it runs on another thread.

    Raises:
      ApiError: whatever keeps it from an answer.
    """
    served.check_name(body.model)
    loop = asyncio.get_running_loop()
    job = await asyncio.to_thread(lambda: Job(served, body, make(), loop))
    job.submit()
    if body.stream:
        return _Stream(job)
    return _Json(await _unless_disconnected(job, http))


class _Stream(StreamingResponse):
    """Server-sent events of a job, which ends with them."""

    def __init__(self, job: Job):
        super().__init__(job.stream(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:  # not in the generator: it may never begin, when the client has gone already
            await super().__call__(scope, receive, send)
        finally:
            self._job.abort()  # does nothing to what is finished; a client that went away frees its pages


class _Json(JSONResponse):
    """JSON that is text already."""

    def render(self, content: str) -> bytes:
        return content.encode()


async def _unless_disconnected(job: Job, http: HttpRequest) -> str:
    """The whole answer, given up as soon as the client is gone."""
    answer = asyncio.ensure_future(job.collect())
    gone = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ApiError(499, "The client has disconnected.")
        return answer.result()
    finally:
        job.abort()
        answer.cancel()
        gone.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _logits_processor(body: Generation, prompt: list[int], stop_tokens: frozenset[int]) -> LogitsProcessor | None:
    penalties = {
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
    }
    bias = body.biases()
    if not bias and penalties == {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}:
        return None  # the engine makes one for what is left, an end that has to wait and a grammar
    return LogitsProcessor(prompt, **penalties, logit_bias=bias, banned=stop_tokens)


def _sse(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json()}\n\n"
