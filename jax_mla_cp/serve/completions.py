"""A completion request: checked, handed to the engine, and its events made into OpenAI's answers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import secrets
import time
from collections.abc import AsyncIterator

from jax_mla_cp.batch import Sampling
from jax_mla_cp.engine import (
    Engine,
    EngineDead,
    Event,
    Failed,
    Finished,
    PromptScored,
    QueueFull,
    Request,
    Token,
)
from jax_mla_cp.engine.text import TextStream
from jax_mla_cp.serve import logs
from jax_mla_cp.serve.errors import ApiError, failure, unavailable
from jax_mla_cp.serve.schemas import MAX_PROMPTS, Choice, Completion, CompletionRequest, Logprobs, Usage
from jax_mla_cp.tokenizer import Tokenizer, TokenizerError, require_tokenizer


@dataclasses.dataclass(frozen=True)
class Served:
    """The model as requests see it."""

    name: str
    engine: Engine
    tokenizer: Tokenizer | None
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    seed: int | None
    queue_timeout: float | None = None
    """Seconds, as `jax_mla_cp.engine.Request`'s."""
    request_timeout: float | None = None
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))


class Job:
    """One HTTP request: a request to the engine per prompt, and the events of all of them in one queue."""

    def __init__(self, served: Served, body: CompletionRequest, prompts: list[list[int]]):
        self.id = f"cmpl-{secrets.token_hex(12)}"
        self.body = body
        self._served = served
        self._created = int(time.time())
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        seed = body.seed if body.seed is not None else served.seed
        self._requests = [self._request(i, prompt, seed) for i, prompt in enumerate(prompts)]
        self._offset = [0] * len(prompts)
        self._completion_tokens = 0
        self._log = logs.current()

    def _request(self, index: int, prompt: list[int], seed: int | None) -> Request:
        body = self.body
        sampling = Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            seed=secrets.randbits(64) if seed is None else seed,
        )
        room = self._served.max_model_len - len(prompt)
        return Request(
            prompt=prompt,
            max_tokens=room if body.max_tokens is None else body.max_tokens,
            sampling=sampling,
            stop_tokens=frozenset() if body.ignore_eos else frozenset(self._served.eos_token_ids),
            text=TextStream(self._served.tokenizer, body.stops()),
            emit=lambda event: self._deliver(index, event),
            queue_timeout=self._served.queue_timeout,
            timeout=self._served.request_timeout,
        )

    def _deliver(self, index: int, event: Event) -> None:
        """On the engine's thread. The event loop may be gone, when the server is stopping."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

    def submit(self) -> None:
        try:
            self._served.engine.submit_all(self._requests)
        except QueueFull as error:
            raise unavailable(f"The server is busy: {error}", "queue_full") from error
        except EngineDead as error:
            raise ApiError(503, f"The server takes no requests: {error}", code="engine_dead") from error

    def abort(self) -> None:
        """Drops what is not finished; its pages are free within a step."""
        for request in self._requests:
            self._served.engine.abort(request)

    async def events(self) -> AsyncIterator[tuple[int, Token | Finished | Failed]]:
        """All events, until every prompt's is finished or one fails."""
        left = len(self._requests)
        while left:
            index, event = await self._events.get()
            self._log.take(index, self._requests[index], event)
            if isinstance(event, PromptScored):
                continue
            self._completion_tokens += isinstance(event, Token)
            left -= isinstance(event, Finished)
            yield index, event
            if isinstance(event, Failed):
                return

    def choice(self, index: int, event: Token | Finished) -> Choice:
        """One event as a chunk of a choice."""
        if isinstance(event, Finished):
            self._offset[index] += len(event.text)
            return Choice(index=index, text=event.text, finish_reason=event.reason)
        logprobs = self._logprobs(index, event) if self.body.logprobs is not None else None
        self._offset[index] += len(event.text)
        return Choice(index=index, text=event.text, logprobs=logprobs)

    def _logprobs(self, index: int, event: Token) -> Logprobs:
        count = self.body.logprobs or 0
        top = {
            token_name(self._served.tokenizer, int(token)): _finite(value)
            for token, value in zip(event.top_tokens[:count], event.top_logprobs[:count], strict=True)
        }
        name = token_name(self._served.tokenizer, event.token)
        logprob = _finite(event.logprob)
        if count:
            top.setdefault(name, logprob)  # the sampled token is always among them
        return Logprobs(tokens=[name], token_logprobs=[logprob], top_logprobs=[top], text_offset=[self._offset[index]])

    def completion(self, choices: list[Choice], *, usage: bool) -> Completion:
        prompt = sum(len(request.prompt) for request in self._requests)
        done = self._completion_tokens
        counted = Usage(prompt_tokens=prompt, completion_tokens=done, total_tokens=prompt + done)
        return Completion(
            id=self.id, created=self._created, model=self.body.model, choices=choices, usage=counted if usage else None
        )

    async def collect(self) -> Completion:
        """The whole answer.

        Raises:
          ApiError: the engine failed the request.
        """
        parts: list[list[Choice]] = [[] for _ in self._requests]
        async for index, event in self.events():
            if isinstance(event, Failed):
                raise failure(event)
            parts[index].append(self.choice(index, event))
        return self.completion([_join(chunks) for chunks in parts], usage=True)

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: a chunk per event, usage if asked for, [DONE]."""
        async for index, event in self.events():
            if isinstance(event, Failed):
                yield f"data: {json.dumps(failure(event).body)}\n\n"
                break
            chunk = self.completion([self.choice(index, event)], usage=False)
            yield f"data: {chunk.model_dump_json(exclude={'usage'})}\n\n"
        else:
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield f"data: {self.completion([], usage=True).model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"


def _finite(logprob: float) -> float:
    """JSON has no infinity; -9999 stands for what can't be, as in vLLM."""
    return float(logprob) if math.isfinite(logprob) else -9999.0


def token_name(tokenizer: Tokenizer | None, token: int) -> str:
    """A token's text; where that says too little (half a code point, a special token), its number, as vLLM writes it."""
    text = tokenizer.decode([token]) if tokenizer else ""
    return text if text and "\ufffd" not in text else f"token_id:{token}"


def _join(chunks: list[Choice]) -> Choice:
    entries = [c.logprobs for c in chunks if c.logprobs is not None]
    logprobs = None
    if entries:
        logprobs = Logprobs(
            **{field: [x for e in entries for x in getattr(e, field)] for field in Logprobs.model_fields}
        )
    return Choice(
        index=chunks[0].index,
        text="".join(c.text for c in chunks),
        logprobs=logprobs,
        finish_reason=chunks[-1].finish_reason,
    )


def tokenize(served: Served, body: CompletionRequest) -> list[list[int]]:
    """The prompts' token ids, all checked against what the model can take.

    Raises:
      ApiError: 404 for another model's name, 400 for a prompt that is empty, too long or not in the vocabulary.
    """
    if body.model != served.name:
        message = f"The model {ascii(body.model)[:100]} does not exist; this server has {served.name!r}."
        raise ApiError(404, message, param="model", code="model_not_found")
    prompts = body.prompts()
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise ApiError(400, f"prompt: 1 to {MAX_PROMPTS} prompts are allowed, got {len(prompts)}.", param="prompt")
    if body.stops() and served.tokenizer is None:
        raise ApiError(400, "stop: this model has no tokenizer, so its output has no text to stop at.", param="stop")
    return [_tokenize(served, body, prompt) for prompt in prompts]


def _tokenize(served: Served, body: CompletionRequest, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        try:
            ids = require_tokenizer(served.tokenizer).encode(prompt) if prompt else []
        except TokenizerError as error:
            raise ApiError(400, f"prompt: {error}", param="prompt") from error
    else:
        ids = list(prompt)
    if not ids:
        raise ApiError(400, "prompt: must not be empty; give at least one token.", param="prompt")
    if (bad := max(ids)) >= served.vocab_size:
        message = f"prompt: token id {bad} is not in the vocabulary (0 to {served.vocab_size - 1})."
        raise ApiError(400, message, param="prompt")
    wanted = 1 if body.max_tokens is None else body.max_tokens
    if len(ids) + wanted > served.max_model_len:
        message = (
            f"prompt has {len(ids)} tokens and max_tokens is {wanted}; together they may be at most "
            f"{served.max_model_len}. Shorten the prompt or ask for fewer tokens."
        )
        raise ApiError(400, message, param="prompt", code="context_length_exceeded")
    return ids
