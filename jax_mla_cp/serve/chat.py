"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.responses import Response

from jax_mla_cp.engine import Finished, Grammar, PromptLogprobs, Token
from jax_mla_cp.serve import preprocessing
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.logprobs import chat_logprobs, prompt_logprobs
from jax_mla_cp.serve.openapi import streaming_response
from jax_mla_cp.serve.reasoning import (
    END_TAG,
    GrammarAfterReasoning,
    ReasoningParser,
    is_reasoning_model,
    prompt_starts_reasoning,
)
from jax_mla_cp.serve.response import OutputEvent, new_metadata, respond
from jax_mla_cp.serve.schemas import (
    AssistantMessage,
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
from jax_mla_cp.serve.served_model import ServedModel


def install(app: FastAPI, served: ServedModel) -> None:
    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=streaming_response(ChatChunk),
        summary="Create a chat completion",
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await respond(served, body, lambda: _ChatBuilder(served, body), request)


class _ChatBuilder:
    """Implements `jax_mla_cp.serve.response.ResponseBuilder`."""

    def __init__(self, served: ServedModel, body: ChatRequest):
        """Raises `ApiError` for a request that the model can't serve."""
        self.metadata = new_metadata("chatcmpl", body.model)
        tokenizer = served.require_tokenizer("messages")
        self.prompts = [preprocessing.encode_messages(served, body.messages)]
        preprocessing.check_request(served, body, self.prompts, "messages")
        self._grammar = preprocessing.compile_grammar(served, body)
        self._served = served
        self._body = body
        is_reasoning = is_reasoning_model(tokenizer)
        self._in_reasoning = is_reasoning and prompt_starts_reasoning(tokenizer, self.prompts[0])
        self._end_token = tokenizer.token_id(END_TAG)
        if self._grammar and self._in_reasoning and self._end_token is None:
            message = (
                f"response_format: not available. This model reasons before it answers, and {END_TAG} is not a single "
                "token, so the grammar can't tell where the answer starts."
            )
            raise ApiError(400, message, param="response_format")
        # A grammar that applies from the first token on leaves no place for reasoning.
        parse = is_reasoning and (self._grammar is None or self._in_reasoning)
        self._parsers = [
            ReasoningParser(in_reasoning=self._in_reasoning) if parse else None for _ in range(body.n or 1)
        ]

    def grammar(self, prompt: int) -> Grammar | None:
        if self._grammar is None:
            return None
        grammar = self._grammar.copy()
        if self._in_reasoning and self._end_token is not None:
            return GrammarAfterReasoning(grammar, self._end_token, self._served.vocab_size)
        return grammar

    def first_chunks(self) -> Sequence[ChatChunk]:
        first = Delta(role="assistant", content="")
        return [self._chunk(DeltaChoice(index=i, delta=first)) for i in range(len(self._parsers))]

    def chunk(self, index: int, event: OutputEvent) -> ChatChunk | None:
        if isinstance(event, PromptLogprobs):
            return None  # refused with stream
        reasoning, content = self._parse(index, event)
        choice = DeltaChoice(index=index, delta=Delta(content=content or None, reasoning_content=reasoning or None))
        if isinstance(event, Finished):
            choice.finish_reason, choice.stop_reason = event.reason, self._served.stop_reason(event)
        else:
            if not reasoning:
                choice.delta.content = content  # an empty delta still reports that a token was generated
            choice.logprobs = self._logprobs([event])
        return self._chunk(choice)

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self.metadata, choices=[], usage=usage)

    def full_response(self, events: Sequence[Sequence[OutputEvent]], usage: Usage) -> ChatCompletion:
        choices = [self._choice(index, of_choice) for index, of_choice in enumerate(events)]
        scores = next((event for event in events[0] if isinstance(event, PromptLogprobs)), None)
        found: PromptLogprobsJson | None = None
        if scores is not None and (count := self._body.prompt_logprobs) is not None:
            found = prompt_logprobs(self._served.token_texts, self.prompts[0], scores, count)
        return ChatCompletion(**self.metadata, choices=choices, usage=usage, prompt_logprobs=found)

    def _choice(self, index: int, events: Sequence[OutputEvent]) -> ChatChoice:
        output = [event for event in events if not isinstance(event, PromptLogprobs)]
        parsed = [self._parse(index, event) for event in output]
        finished = output[-1]
        assert isinstance(finished, Finished)
        return ChatChoice(
            index=index,
            message=AssistantMessage(
                content="".join(content for _, content in parsed),
                reasoning_content="".join(reasoning for reasoning, _ in parsed) or None,
            ),
            logprobs=self._logprobs([event for event in output if isinstance(event, Token)]),
            finish_reason=finished.reason,
            stop_reason=self._served.stop_reason(finished),
        )

    def _parse(self, index: int, event: Token | Finished) -> tuple[str, str]:
        """Splits an event's text into (reasoning, content)."""
        parser = self._parsers[index]
        if parser is None:
            return "", event.text
        reasoning, content = parser.push(event.text)
        if isinstance(event, Finished):
            rest = parser.flush()
            reasoning, content = reasoning + rest[0], content + rest[1]
        return reasoning, content

    def _logprobs(self, events: Sequence[Token]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        count = self._body.top_logprobs or 0
        return ChatLogprobs(content=[chat_logprobs(self._served.token_texts, event, count) for event in events])

    def _chunk(self, choice: DeltaChoice) -> ChatChunk:
        return ChatChunk(**self.metadata, choices=[choice])
