"""The request and response bodies: OpenAI's completions and chat APIs and the extras that vLLM and SGLang made common."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import BaseModel, Field, model_validator

from jax_mla_cp.serve.fields import MAX_LOGPROBS, Body, Count, Generation, Many, Text, TokenId

MAX_MESSAGES = 4096


IF_SAID = Field(exclude_if=lambda value: value is None)
"""Of an answer's fields that are there only when they say something."""


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: Text | Many[Text] | Many[TokenId] | Many[Many[TokenId]] = Field(
        description="text or token ids, one or many"
    )
    max_tokens: Count | None = Field(default=16, description="at least 1; with echo 0 too")
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="so many of the likeliest tokens, beside the sampled one"
    )
    echo: bool | None = Field(default=False, description="the prompt before the answer, with its log-probabilities")
    best_of: Literal[1] | None = Field(default=None, description="only 1, and then n too")

    @model_validator(mode="after")
    def _completion(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 without echo")
        if self.best_of and (self.n or 1) > 1:
            raise ValueError("best_of is 1, but n asks for more; leave best_of out")
        return self

    def limit(self) -> int | None:
        return self.max_tokens

    def scores_prompt(self) -> bool:
        return super().scores_prompt() or (bool(self.echo) and (self.logprobs is not None or self.max_tokens == 0))

    def scores_per_token(self) -> int:
        echoed = self.echo and self.logprobs is not None
        return super().scores_per_token() + (1 + (self.logprobs or 0) if echoed else 0)

    def prompts(self) -> list[str | list[int]]:
        """One or many, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(cast("list[str] | list[list[int]]", self.prompt))


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    role: Literal["system", "user", "assistant"]
    content: Text | Many[TextPart]
    reasoning_content: Text | None = Field(
        default=None, description="of an earlier answer; models are not shown their earlier thoughts"
    )


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[Many[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="default: what fits"
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="the older name of max_completion_tokens"
    )
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS, description="only with logprobs")

    @model_validator(mode="after")
    def _chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is only for logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens are two names of one number, but differ")
        return self

    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="of the prompt: reused from the cache")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(BaseModel):
    """vLLM's form of one candidate for a prompt token."""

    logprob: float
    rank: int | None = Field(description="1 is the likeliest; null: below the 20 that are ranked")
    decoded_token: str


PromptLogprobsJson = list[dict[str, PromptLogprob] | None]
"""By token of the prompt, then by token id; the first token has none."""


class Logprobs(BaseModel):
    """One entry per token; `text_offset` counts from the text's start. An echoed prompt's first token has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length"]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = Field(default=None, description="the stop token or string that ended the answer")
    prompt_logprobs: Annotated[PromptLogprobsJson | None, IF_SAID] = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Annotated[Usage | None, IF_SAID] = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: Annotated[str | None, IF_SAID] = None


class ChatChoice(BaseModel):
    index: int
    message: Answer
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = Field(default=None, description="the stop token or string that ended the answer")


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: Annotated[PromptLogprobsJson | None, IF_SAID] = None


class Delta(BaseModel):
    role: Annotated[Literal["assistant"] | None, IF_SAID] = None
    content: Annotated[str | None, IF_SAID] = None
    reasoning_content: Annotated[str | None, IF_SAID] = None


class DeltaChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: Annotated[Usage | None, IF_SAID] = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jax_mla_cp"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    """What every answer other than 200 looks like."""

    error: ErrorDetail
