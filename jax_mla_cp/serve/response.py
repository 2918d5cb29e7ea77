"""From a preprocessed HTTP request to its response, streamed or in one piece: shared by completions and chat."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypedDict, TypeVar

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
from jax_mla_cp.serve.errors import ApiError, failure, timed_out, unavailable
from jax_mla_cp.serve.schemas.generation import GenerationRequest
from jax_mla_cp.serve.schemas.responses import ChatChunk, Completion, PromptTokensDetails, Usage
from jax_mla_cp.serve.served_model import ServedModel

T = TypeVar("T")
OutputEvent = PromptLogprobs | Token | Finished
"""The engine's events other than `Failed`."""


class ResponseMetadata(TypedDict):
    """The fields that every response and every chunk starts with."""

    id: str
    created: int
    model: str


def new_metadata(id_prefix: str, model: str) -> ResponseMetadata:
    return ResponseMetadata(id=f"{id_prefix}-{secrets.token_hex(12)}", created=int(time.time()), model=model)


class ResponseBuilder(Protocol):
    """Turns output events into one API's chunks and responses. Choice i belongs to prompt `i // n`."""

    metadata: ResponseMetadata

    @property
    def prompts(self) -> Sequence[list[int]]:
        """Token ids of each prompt."""

    @property
    def shown_tokens(self) -> frozenset[int]:
        """Special tokens that are part of the output's text."""

    def grammar(self, prompt: int) -> Grammar | None:
        """A new grammar for one choice of this prompt; None: free text."""

    def first_chunks(self) -> Sequence[Completion | ChatChunk]:
        """Chunks to send before the first event."""

    def chunk(self, index: int, event: OutputEvent) -> Completion | ChatChunk | None:
        """The chunk for an event of choice `index`; None: nothing to send."""

    def usage_chunk(self, usage: Usage) -> BaseModel:
        """The last chunk, with the usage and no choices."""

    def full_response(self, events: Sequence[Sequence[OutputEvent]], usage: Usage) -> BaseModel:
        """The response without streaming, from the events of each choice."""


class RequestGroup:
    """The engine requests of one HTTP request, one per choice, with their events merged into one queue."""

    def __init__(
        self,
        served: ServedModel,
        body: GenerationRequest,
        builder: ResponseBuilder,
        loop: asyncio.AbstractEventLoop,
        arrival_time: float,
    ):
        """
        Args:
          arrival_time: of the HTTP request, `time.monotonic()`.
        """
        self._served = served
        self._body = body
        self._builder = builder
        self._loop = loop
        self._arrival_time = arrival_time
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._n = body.n or 1
        seed = body.seed if body.seed is not None else served.default_seed
        self._requests = [
            self._request(prompt * self._n + i, prompt, secrets.randbits(64) if seed is None else (seed + i) % 2**64)
            for prompt in range(len(builder.prompts))
            for i in range(self._n)
        ]
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._log_entry = logs.current()

    def _request(self, index: int, prompt_index: int, seed: int) -> Request:
        body, served, prompt = self._body, self._served, self._builder.prompts[prompt_index]
        eos = () if body.ignore_eos else served.eos_token_ids
        stop_tokens = frozenset([*eos, *(body.stop_token_ids or ())])
        limit, min_tokens = body.token_limit(), body.min_tokens or 0
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
            text=TextStream(
                served.tokenizer,
                body.stop_strings(),
                include_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False,
                shown_tokens=self._builder.shown_tokens,
            ),
            emit=lambda event: self._deliver(index, event),
            id=f"{self._builder.metadata['id']}-{index}",  # unique per choice: the status page tells prompts apart by it
            min_tokens=min_tokens,
            logits_processor=_logits_processor(body, prompt, stop_tokens),
            grammar=self._builder.grammar(prompt_index),
            prompt_logprobs=body.needs_prompt_logprobs(),
            cache_salt=body.cache_salt or "",
            queue_timeout=served.queue_timeout,
            timeout=served.request_timeout,
            arrival_time=self._arrival_time,
        )

    def _deliver(self, index: int, event: Event) -> None:
        """Runs on the engine's thread. The event loop may already be closed when the server stops."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def submit(self) -> None:
        """Submits all requests to the engine, or none.

        Raises:
          ApiError: 503 if the queue is full or the engine accepts no requests; 400 if a request exceeds the cache, or all of
            them the queue.
        """
        try:
            self._served.engine.submit_all(self._requests)
        except QueueFull as error:
            raise unavailable(f"The server is busy: {error}", "queue_full") from error
        except EngineDead as error:
            raise ApiError(503, f"The server is not accepting requests: {error}", code="engine_dead") from error
        except ValueError as error:
            param = str(error).partition(":")[0]
            code = "context_length_exceeded" if param == "max_tokens" else None
            raise ApiError(400, str(error), param=param, code=code) from error

    def abort(self) -> None:
        """Aborts the unfinished requests; their pages are freed within a step."""
        for request in self._requests:
            self._served.engine.abort(request)

    async def events(self) -> AsyncIterator[tuple[int, OutputEvent]]:
        """Yields (choice, event) until every choice is finished.

        Raises:
          ApiError: the engine failed a request.
        """
        unfinished = len(self._requests)
        while unfinished:
            index, event = await self._events.get()
            self._log_entry.record(index, self._requests[index], event)
            if isinstance(event, Failed):
                raise failure(event, self._body.grammar_field())
            if isinstance(event, Token):
                self._completion_tokens += 1
            elif isinstance(event, Finished):
                unfinished -= 1
                if index % self._n == 0:  # count a prompt once, whatever its number of choices
                    self._cached_tokens += event.cached_tokens
            yield index, event

    def usage(self) -> Usage:
        prompt_tokens = sum(map(len, self._builder.prompts))
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._completion_tokens,
            total_tokens=prompt_tokens + self._completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached_tokens),
        )

    async def collect(self) -> str:
        """The full response as JSON.

        Raises:
          ApiError: as `events`.
        """
        by_choice: dict[int, list[OutputEvent]] = defaultdict(list)
        async for index, event in self.events():
            by_choice[index].append(event)
        events = [by_choice[index] for index in range(len(self._requests))]
        # Serializing the log-probabilities of a long prompt would block the event loop.
        return await asyncio.to_thread(lambda: self._builder.full_response(events, self.usage()).model_dump_json())

    async def stream(self) -> AsyncIterator[str]:
        """Yields server-sent events: a chunk per output event, the usage if requested, or an error; then [DONE]."""
        try:
            for first in self._builder.first_chunks():
                yield self._event(first)
            async for index, event in self.events():
                if isinstance(event, PromptLogprobs):
                    chunk = await asyncio.to_thread(self._builder.chunk, index, event)
                else:
                    chunk = self._builder.chunk(index, event)
                if chunk is not None:
                    yield self._event(chunk)
            if self._body.stream_options and self._body.stream_options.include_usage:
                yield _sse(self._builder.usage_chunk(self.usage()))
        except ApiError as error:
            yield f"data: {json.dumps(error.body)}\n\n"
        yield "data: [DONE]\n\n"

    def _event(self, chunk: Completion | ChatChunk) -> str:
        """The chunk as a server-sent event, with the usage so far if asked for."""
        if self._body.has_continuous_usage():
            chunk.usage = self.usage()
        return _sse(chunk)


async def respond(
    served: ServedModel, body: GenerationRequest, make_builder: Callable[[], ResponseBuilder], http: HttpRequest
) -> Response:
    """Runs a request and returns its response.

    Args:
      make_builder: preprocesses the request; runs on another thread, since tokenization may take long.

    Raises:
      ApiError: the request is invalid or fails.
    """
    served.check_model_name(body.model)
    group = await _unless_disconnected(_prepare(served, body, make_builder), http)
    group.submit()
    if body.stream:
        return _EventStream(group)
    try:
        return _SerializedJson(await _unless_disconnected(group.collect(), http))
    finally:
        group.abort()


async def _prepare(
    served: ServedModel, body: GenerationRequest, make_builder: Callable[[], ResponseBuilder]
) -> RequestGroup:
    """Makes the requests on another thread. Raises 408 if that takes longer than the whole request may."""
    loop, arrival_time = asyncio.get_running_loop(), time.monotonic()

    def prepare() -> RequestGroup:
        return RequestGroup(served, body, make_builder(), loop, arrival_time)

    try:
        async with asyncio.timeout(served.request_timeout):
            if body.grammar_field():
                return await served.grammar_workers.run(prepare)
            return await asyncio.to_thread(prepare)
    except TimeoutError:
        message = f"The request did not finish within {served.request_timeout:g} s: its preparation took as long."
        raise timed_out(message) from None


class _EventStream(StreamingResponse):
    """A group's server-sent events. Aborts the group when the response ends."""

    def __init__(self, group: RequestGroup):
        super().__init__(group.stream(), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._group = group

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:  # not in the generator, which never starts if the client has already disconnected
            await super().__call__(scope, receive, send)
        finally:
            self._group.abort()  # no effect on finished requests; frees the pages of a client that disconnected


class _SerializedJson(JSONResponse):
    """A response whose content is JSON text."""

    def render(self, content: str) -> bytes:
        return content.encode()


async def _unless_disconnected(work: Coroutine[Any, Any, T], http: HttpRequest) -> T:
    """The work's result; cancelled as soon as the client disconnects."""
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "The client disconnected.")
        return task.result()
    finally:
        task.cancel()
        disconnected.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _logits_processor(
    body: GenerationRequest, prompt: list[int], stop_tokens: frozenset[int]
) -> LogitsProcessor | None:
    penalties = {
        "presence_penalty": body.presence_penalty or 0.0,
        "frequency_penalty": body.frequency_penalty or 0.0,
        "repetition_penalty": 1.0 if body.repetition_penalty is None else body.repetition_penalty,
    }
    bias = body.logit_bias_by_id()
    if not bias and penalties == {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}:
        return None  # the engine makes its own for min_tokens and grammars
    return LogitsProcessor(prompt, **penalties, logit_bias=bias, banned=stop_tokens)


def _sse(chunk: BaseModel) -> str:
    return f"data: {chunk.model_dump_json()}\n\n"
