"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.responses import Response

from jax_mla_cp.engine import Finished, Grammar, PromptLogprobs
from jax_mla_cp.serve import prompts
from jax_mla_cp.serve.job import Good, new_head, respond
from jax_mla_cp.serve.logprobs import entry, join, prompt_entries, prompt_logprobs
from jax_mla_cp.serve.openapi import streams
from jax_mla_cp.serve.schemas import Choice, Completion, CompletionRequest, Logprobs, Usage
from jax_mla_cp.serve.served import Served
from jax_mla_cp.tokenizer import Detokenizer


def install(app: FastAPI, served: Served) -> None:
    @app.post("/v1/completions", response_model=Completion, responses=streams(Completion), summary="Continue a prompt")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await respond(served, body, lambda: _Completions(served, body), request)


class _Completions:
    """Implements `jax_mla_cp.serve.job.Form`."""

    def __init__(self, served: Served, body: CompletionRequest):
        """Raises an `ApiError` for what can't be done."""
        self.head = new_head("cmpl", body.model)
        self.prompts = prompts.completion_prompts(served, body)
        prompts.check(served, body, self.prompts, "prompt")
        self._grammar = prompts.grammar_of(served, body)
        self._served = served
        self._body = body
        self._n = body.n or 1
        given = zip(body.prompts(), self.prompts, strict=True) if body.echo else ()
        self._echoes = [_Echo(served, prompt, ids) for prompt, ids in given]
        self._offset = [0] * (len(self.prompts) * self._n)
        """Characters of a choice's text so far."""

    def grammar(self, prompt: int) -> Grammar | None:
        return self._grammar and self._grammar.copy()

    def opening(self) -> Sequence[Completion]:
        if not self._echo_at_once:
            return []
        return [self._completion([self._echoed(index)]) for index in range(len(self._offset))]

    def chunk(self, index: int, event: Good) -> Completion | None:
        choice = self._choice(index, event)
        return None if choice is None else self._completion([choice])

    def last_chunk(self, usage: Usage) -> Completion:
        return self._completion([], usage)

    def whole(self, events: Sequence[Sequence[Good]], usage: Usage) -> Completion:
        choices = []
        for index, of_choice in enumerate(events):
            opening = [self._echoed(index)] if self._echo_at_once else []
            said = (self._choice(index, event) for event in of_choice)
            choices.append(_join([*opening, *(choice for choice in said if choice is not None)]))
        return self._completion(choices, usage)

    @property
    def _echo_at_once(self) -> bool:
        """Without log-probabilities an echo doesn't have to wait for the prompt to run."""
        return bool(self._body.echo) and self._body.logprobs is None

    def _echoed(self, index: int, logprobs: Logprobs | None = None) -> Choice:
        text = self._echoes[index // self._n].text
        self._offset[index] += len(text)
        return Choice(index=index, text=text, logprobs=logprobs)

    def _choice(self, index: int, event: Good) -> Choice | None:
        if isinstance(event, PromptLogprobs):
            return self._scored(index, event)
        at = self._offset[index]
        self._offset[index] += len(event.text)
        if isinstance(event, Finished):
            return Choice(
                index=index, text=event.text, finish_reason=event.reason, stop_reason=self._served.stop_reason(event)
            )
        logprobs = None
        if (count := self._body.logprobs) is not None:
            names, top = self._served.names, (event.top_tokens, event.top_logprobs)
            logprobs = entry(names, event.token, event.logprob, *top, count, at)
        return Choice(index=index, text=event.text, logprobs=logprobs)

    def _scored(self, index: int, event: PromptLogprobs) -> Choice | None:
        body, names, ids = self._body, self._served.names, self.prompts[index // self._n]
        choice = None
        if body.echo and body.logprobs is not None:
            offsets = self._echoes[index // self._n].offsets()
            choice = self._echoed(index, prompt_entries(names, ids, offsets, event, body.logprobs))
        if body.prompt_logprobs is not None:
            choice = choice or Choice(index=index, text="")
            choice.prompt_logprobs = prompt_logprobs(names, ids, event, body.prompt_logprobs)
        return choice

    def _completion(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(**self.head, choices=choices, usage=usage)


class _Echo:
    """A prompt as it is echoed: text as it came, token ids as their text."""

    def __init__(self, served: Served, prompt: str | list[int], ids: list[int]):
        self._tokenizer = served.tokenizer
        self._ids = ids
        decoded = "" if self._tokenizer is None else self._tokenizer.decode(ids)
        self.text = prompt if isinstance(prompt, str) else decoded

    def offsets(self) -> list[int]:
        """Where each token's text begins."""
        if self._tokenizer is None:
            return [0] * len(self._ids)
        stream, found, at = Detokenizer(self._tokenizer), [], 0
        for token in self._ids:
            found.append(at)
            at += len(stream.add(token))
        return found


def _join(parts: list[Choice]) -> Choice:
    """One choice of its chunks."""
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    last = parts[-1]
    return Choice(
        index=last.index,
        text="".join(part.text for part in parts),
        logprobs=join(logprobs) if logprobs else None,
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_logprobs=next((p.prompt_logprobs for p in parts if p.prompt_logprobs is not None), None),
    )
