"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.responses import Response

from jax_mla_cp.engine import Finished, Grammar, PromptLogprobs
from jax_mla_cp.serve import preprocessing
from jax_mla_cp.serve.constraint import compile_grammar
from jax_mla_cp.serve.echo import Echo
from jax_mla_cp.serve.logprobs import completion_logprobs, concat, echo_logprobs, prompt_logprobs
from jax_mla_cp.serve.openapi import streaming_response
from jax_mla_cp.serve.response import OutputEvent, new_metadata, respond
from jax_mla_cp.serve.schemas.completions import CompletionRequest
from jax_mla_cp.serve.schemas.responses import Choice, Completion, Logprobs, Usage
from jax_mla_cp.serve.served_model import ServedModel


def install(app: FastAPI, served: ServedModel) -> None:
    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses=streaming_response(Completion),
        summary="Create a completion",
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(served, body, lambda: _CompletionBuilder(served, body), request)


class _CompletionBuilder:
    """Implements `jax_mla_cp.serve.response.ResponseBuilder`."""

    def __init__(self, served: ServedModel, body: CompletionRequest):
        """Raises `ApiError` for a request that the model can't serve."""
        self.shown_tokens: frozenset[int] = frozenset()
        self.metadata = new_metadata("cmpl", body.model)
        self.prompts = preprocessing.encode_prompts(served, body)
        preprocessing.check_request(served, body, self.prompts, "prompt")
        self._grammar = compile_grammar(served, body)
        self._served = served
        self._body = body
        self._n = body.n or 1
        self._texts = served.token_texts.as_ids if body.return_tokens_as_token_ids else served.token_texts
        echoed = zip(body.prompts(), self.prompts, strict=True) if body.echo else ()
        self._echoes = [Echo(served, body, prompt, ids) for prompt, ids in echoed]

    def grammar(self, prompt: int) -> Grammar | None:
        return self._grammar and self._grammar.copy()

    def first_chunks(self) -> Sequence[Completion]:
        return [
            self._completion([first])
            for i in range(len(self.prompts) * self._n)
            if (first := self._first(i)) is not None
        ]

    def chunk(self, index: int, event: OutputEvent) -> Completion | None:
        choice = self._choice(index, event)
        return None if choice is None else self._completion([choice])

    def usage_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def full_response(self, events: Sequence[Sequence[OutputEvent]], usage: Usage) -> Completion:
        choices = []
        for index, of_choice in enumerate(events):
            chunks = [self._first(index), *(self._choice(index, event) for event in of_choice)]
            choices.append(_concat([chunk for chunk in chunks if chunk is not None]))
        return self._completion(choices, usage)

    @property
    def _echo_first(self) -> bool:
        """True if the echo doesn't have to wait for the prompt's log-probabilities."""
        return bool(self._body.echo) and self._body.logprobs is None

    def _first(self, index: int) -> Choice | None:
        """The part of a choice that is known before its first token."""
        first = self._echo(index) if self._echo_first else None
        if self._body.return_token_ids:
            first = first or Choice(index=index, text="")
            first.prompt_token_ids = self.prompts[index // self._n]
        return first

    def _echo(self, index: int, logprobs: Logprobs | None = None) -> Choice:
        return Choice(index=index, text=self._echoes[index // self._n].text, logprobs=logprobs)

    def _echo_length(self, index: int) -> int:
        """Characters of a choice's text before its output."""
        return len(self._echoes[index // self._n].text) if self._echoes else 0

    def _choice(self, index: int, event: OutputEvent) -> Choice | None:
        if isinstance(event, PromptLogprobs):
            return self._prompt_choice(index, event)
        if isinstance(event, Finished):
            stop = self._served.stop_reason(event, self._body)
            return Choice(index=index, text=event.text, finish_reason=event.reason, stop_reason=stop)
        logprobs = None
        if (count := self._body.logprobs) is not None:
            top = (event.top_tokens, event.top_logprobs)
            offset = self._echo_length(index) + event.text_offset
            logprobs = completion_logprobs(self._texts, event.token, event.logprob, *top, count, offset)
        token_ids = [event.token] if self._body.return_token_ids else None
        return Choice(index=index, text=event.text, logprobs=logprobs, token_ids=token_ids)

    def _prompt_choice(self, index: int, event: PromptLogprobs) -> Choice | None:
        """The prompt's part of a choice: the echo with log-probabilities, and `prompt_logprobs`."""
        body, texts, ids = self._body, self._texts, self.prompts[index // self._n]
        choice = None
        if body.echo and body.logprobs is not None:
            offsets = self._echoes[index // self._n].offsets()
            choice = self._echo(index, echo_logprobs(texts, ids, offsets, event, body.logprobs))
        if body.prompt_logprobs is not None:
            choice = choice or Choice(index=index, text="")
            choice.prompt_logprobs = prompt_logprobs(texts, ids, event, body.prompt_logprobs)
        return choice

    def _completion(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(**self.metadata, choices=choices, usage=usage)


def _concat(chunks: list[Choice]) -> Choice:
    """Merges the chunks of one choice."""
    logprobs = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    token_ids = [token for chunk in chunks for token in chunk.token_ids or ()]
    last = chunks[-1]
    return Choice(
        index=last.index,
        text="".join(chunk.text for chunk in chunks),
        logprobs=concat(logprobs) if logprobs else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=next((c.prompt_logprobs for c in chunks if c.prompt_logprobs is not None), None),
        prompt_token_ids=chunks[0].prompt_token_ids,
        token_ids=token_ids if chunks[0].prompt_token_ids is not None else None,
    )
