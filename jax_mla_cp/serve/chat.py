"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.responses import Response

from jax_mla_cp.engine import Finished, Grammar, PromptLogprobs, Token
from jax_mla_cp.serve import preprocessing
from jax_mla_cp.serve.chat_format import ChatFormat
from jax_mla_cp.serve.logprobs import chat_logprobs, prompt_logprobs
from jax_mla_cp.serve.openapi import streaming_response
from jax_mla_cp.serve.output_parser import ParsedText
from jax_mla_cp.serve.response import OutputEvent, new_metadata, respond
from jax_mla_cp.serve.schemas.chat import ChatRequest
from jax_mla_cp.serve.schemas.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    DeltaChoice,
    FinishReason,
    FunctionCall,
    FunctionDelta,
    PromptLogprobsJson,
    ToolCallDelta,
    ToolCallResult,
    Usage,
)
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.serve.tool_calls import CallDelta


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
        self.prompts = [preprocessing.encode_chat_request(served, body)]
        preprocessing.check_request(served, body, self.prompts, "messages")
        self._format = ChatFormat(served, body, self.prompts[0])
        self._served = served
        self._body = body
        self._texts = served.token_texts.as_ids if body.return_tokens_as_token_ids else served.token_texts
        self._parsers = [self._format.new_parser() for _ in range(body.n or 1)]

    @property
    def shown_tokens(self) -> frozenset[int]:
        return self._format.shown_tokens

    def grammar(self, prompt: int) -> Grammar | None:
        return self._format.new_grammar()

    def first_chunks(self) -> Sequence[ChatChunk]:
        first = Delta(role="assistant", content="")
        chunks = [self._chunk(DeltaChoice(index=i, delta=first)) for i in range(len(self._parsers))]
        if self._body.return_token_ids:
            chunks[0].prompt_token_ids = self.prompts[0]
        return chunks

    def chunk(self, index: int, event: OutputEvent) -> ChatChunk | None:
        if isinstance(event, PromptLogprobs):
            return None  # refused with stream
        parsed = self._parse(index, event)
        choice = DeltaChoice(
            index=index,
            delta=Delta(
                content=parsed.content or None,
                reasoning_content=parsed.reasoning or None,
                tool_calls=[_delta(call) for call in parsed.calls] or None,
            ),
        )
        if isinstance(event, Finished):
            choice.finish_reason, choice.stop_reason = (
                self._finish_reason(index, event),
                self._served.stop_reason(event, self._body),
            )
        else:
            if not parsed.reasoning and not parsed.calls:
                choice.delta.content = parsed.content  # an empty delta still reports that a token was generated
            choice.logprobs = self._logprobs([event])
            choice.token_ids = self._token_ids([event])
        return self._chunk(choice)

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self.metadata, choices=[], usage=usage)

    def full_response(self, events: Sequence[Sequence[OutputEvent]], usage: Usage) -> ChatCompletion:
        choices = [self._choice(index, of_choice) for index, of_choice in enumerate(events)]
        scores = next((event for event in events[0] if isinstance(event, PromptLogprobs)), None)
        found: PromptLogprobsJson | None = None
        if scores is not None and (count := self._body.prompt_logprobs) is not None:
            found = prompt_logprobs(self._texts, self.prompts[0], scores, count)
        prompt_ids = self.prompts[0] if self._body.return_token_ids else None
        return ChatCompletion(
            **self.metadata, choices=choices, usage=usage, prompt_logprobs=found, prompt_token_ids=prompt_ids
        )

    def _choice(self, index: int, events: Sequence[OutputEvent]) -> ChatChoice:
        output = [event for event in events if not isinstance(event, PromptLogprobs)]
        tokens = [event for event in output if isinstance(event, Token)]
        parsed = [self._parse(index, event) for event in output]
        finished = output[-1]
        assert isinstance(finished, Finished)
        content = "".join(part.content for part in parsed)
        reasoning = "".join(part.reasoning for part in parsed)
        calls = _calls([call for part in parsed for call in part.calls])
        return ChatChoice(
            index=index,
            message=AssistantMessage(
                content=content if content or not (reasoning or calls) else None,
                reasoning_content=reasoning or None,
                tool_calls=calls or None,
            ),
            logprobs=self._logprobs(tokens),
            finish_reason=self._finish_reason(index, finished),
            stop_reason=self._served.stop_reason(finished, self._body),
            token_ids=self._token_ids(tokens),
        )

    def _parse(self, index: int, event: Token | Finished) -> ParsedText:
        parser = self._parsers[index]
        return parser.finish(event.text) if isinstance(event, Finished) else parser.push(event.text)

    def _finish_reason(self, index: int, finished: Finished) -> FinishReason:
        """`tool_calls` where the model chose to call; a forced call of one function ends with `stop`, as in OpenAI's API."""
        parser = self._parsers[index]
        chose = parser.has_calls and not parser.is_cut_off and not self._format.is_forced_call
        return "tool_calls" if chose and finished.reason == "stop" else finished.reason

    def _logprobs(self, events: Sequence[Token]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        count = self._body.top_logprobs or 0
        return ChatLogprobs(content=[chat_logprobs(self._texts, event, count) for event in events])

    def _token_ids(self, events: Sequence[Token]) -> list[int] | None:
        return [event.token for event in events] if self._body.return_token_ids else None

    def _chunk(self, choice: DeltaChoice) -> ChatChunk:
        return ChatChunk(**self.metadata, choices=[choice])


def _delta(call: CallDelta) -> ToolCallDelta:
    return ToolCallDelta(
        index=call.index,
        id=call.id,
        type=None if call.id is None else "function",
        function=FunctionDelta(name=call.name, arguments=call.arguments),
    )


def _calls(deltas: Sequence[CallDelta]) -> list[ToolCallResult]:
    """Joins the parts of each call."""
    arguments: dict[int, list[str]] = {}
    for delta in deltas:
        arguments.setdefault(delta.index, []).append(delta.arguments)
    return [
        ToolCallResult(
            id=delta.id, function=FunctionCall(name=delta.name or "", arguments="".join(arguments[delta.index]))
        )
        for delta in deltas
        if delta.id is not None
    ]
