"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.responses import Response

from jax_mla_cp.engine import Finished, Grammar, PromptLogprobs, Token
from jax_mla_cp.serve import prompts
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.job import Good, new_head, respond
from jax_mla_cp.serve.logprobs import chat_entry, prompt_logprobs
from jax_mla_cp.serve.openapi import streams
from jax_mla_cp.serve.reasoning import CLOSE, AfterThoughts, Splitter, opened, reasons
from jax_mla_cp.serve.schemas import (
    Answer,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Delta,
    DeltaChoice,
    PromptLogprobsJson,
    Usage,
)
from jax_mla_cp.serve.served import Served


def install(app: FastAPI, served: Served) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=streams(ChatChunk),
        summary="Answer in a conversation",
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await respond(served, body, lambda: _Chat(served, body), request)


class _Chat:
    """Implements `jax_mla_cp.serve.job.Form`."""

    def __init__(self, served: Served, body: ChatRequest):
        """Raises an `ApiError` for what can't be done."""
        self.head = new_head("chatcmpl", body.model)
        tokenizer = served.need_tokenizer("messages")
        self.prompts = [prompts.encode_messages(served, body.messages)]
        prompts.check(served, body, self.prompts, "messages")
        self._grammar = prompts.grammar_of(served, body)
        self._served = served
        self._body = body
        self._thinks_first = reasons(tokenizer) and opened(tokenizer, self.prompts[0])
        self._close = tokenizer.token_id(CLOSE)
        if self._grammar and self._thinks_first and self._close is None:
            message = (
                f"response_format: this model thinks first, and {CLOSE} is no token of its own to tell the end by."
            )
            raise ApiError(400, message, param="response_format")
        count = body.n or 1
        # An answer that is held to a format from its first token on has no thoughts.
        splits = reasons(tokenizer) and (self._grammar is None or self._thinks_first)
        self._splitters = [Splitter(opened=self._thinks_first) if splits else None for _ in range(count)]

    def grammar(self, prompt: int) -> Grammar | None:
        if self._grammar is None:
            return None
        grammar = self._grammar.copy()
        if self._thinks_first and self._close is not None:
            return AfterThoughts(grammar, self._close, self._served.vocab_size)
        return grammar

    def opening(self) -> Sequence[ChatChunk]:
        return [self._chunk(DeltaChoice(index=i, delta=Delta(role="assistant", content=""))) for i in self._indices]

    def chunk(self, index: int, event: Good) -> ChatChunk | None:
        if isinstance(event, PromptLogprobs):
            return None  # refused with stream
        thoughts, content = self._split(index, event)
        choice = DeltaChoice(index=index, delta=Delta(content=content or None, reasoning_content=thoughts or None))
        if isinstance(event, Finished):
            choice.finish_reason, choice.stop_reason = event.reason, self._served.stop_reason(event)
        else:
            if not thoughts:
                choice.delta.content = content  # a delta without text still says that a token has come
            choice.logprobs = self._logprobs([event])
        return self._chunk(choice)

    def last_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self.head, choices=[], usage=usage)

    def whole(self, events: Sequence[Sequence[Good]], usage: Usage) -> ChatCompletion:
        choices = [self._choice(index, of_choice) for index, of_choice in enumerate(events)]
        scored = next((event for event in events[0] if isinstance(event, PromptLogprobs)), None)
        found: PromptLogprobsJson | None = None
        if scored is not None and (count := self._body.prompt_logprobs) is not None:
            found = prompt_logprobs(self._served.names, self.prompts[0], scored, count)
        return ChatCompletion(**self.head, choices=choices, usage=usage, prompt_logprobs=found)

    @property
    def _indices(self) -> range:
        return range(len(self._splitters))

    def _choice(self, index: int, events: Sequence[Good]) -> ChatChoice:
        said = [event for event in events if not isinstance(event, PromptLogprobs)]
        parts = [self._split(index, event) for event in said]
        end = said[-1]
        assert isinstance(end, Finished)
        return ChatChoice(
            index=index,
            message=Answer(
                content="".join(content for _, content in parts),
                reasoning_content="".join(thoughts for thoughts, _ in parts) or None,
            ),
            logprobs=self._logprobs([event for event in said if isinstance(event, Token)]),
            finish_reason=end.reason,
            stop_reason=self._served.stop_reason(end),
        )

    def _split(self, index: int, event: Token | Finished) -> tuple[str, str]:
        """An event's text as thoughts and answer."""
        splitter = self._splitters[index]
        if splitter is None:
            return "", event.text
        thoughts, content = splitter.push(event.text)
        if isinstance(event, Finished):
            more = splitter.finish()
            thoughts, content = thoughts + more[0], content + more[1]
        return thoughts, content

    def _logprobs(self, events: Sequence[Token]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        count = self._body.top_logprobs or 0
        return ChatLogprobs(content=[chat_entry(self._served.names, event, count) for event in events])

    def _chunk(self, choice: DeltaChoice) -> ChatChunk:
        return ChatChunk(**self.head, choices=[choice])
