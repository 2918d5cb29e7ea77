"""Request and response bodies: OpenAI's completions and chat APIs with the common extensions of vLLM and SGLang."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import BaseModel, Field, model_validator

from jax_mla_cp.serve.fields import (
    MAX_LOGPROBS,
    FailFastList,
    GenerationRequest,
    RequestBody,
    Text,
    TokenCount,
    TokenId,
)

MAX_MESSAGES = 4096
OMIT_NONE = Field(exclude_if=lambda value: value is None)
"""For response fields that are left out when they are None."""


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Text | FailFastList[Text] | FailFastList[TokenId] | FailFastList[FailFastList[TokenId]] = Field(
        description="The prompt or prompts: a string, a list of token ids, or a list of either."
    )
    max_tokens: TokenCount | None = Field(
        default=16,
        description="Maximum number of tokens to generate. 0 is allowed with `echo`; null means up to the maximum context "
        "length.",
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Return the log-probability of each generated token and of this many most likely tokens at its "
        "position.",
    )
    echo: bool | None = Field(
        default=False,
        description="Return the prompt before the output; with `logprobs`, including its log-probabilities.",
    )
    best_of: Literal[1] | None = Field(default=None, description="Only 1 is supported, with `n` 1.")

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens must be at least 1 unless echo is true")
        if self.best_of and (self.n or 1) > 1:
            raise ValueError("best_of must not be less than n, and only best_of=1 is supported; omit best_of")
        return self

    def token_limit(self) -> int | None:
        return self.max_tokens

    def needs_prompt_logprobs(self) -> bool:
        echo_logprobs = bool(self.echo) and (self.logprobs is not None or self.max_tokens == 0)
        return super().needs_prompt_logprobs() or echo_logprobs

    def prompt_logprobs_per_token(self) -> int:
        echo_logprobs = self.echo and self.logprobs is not None
        return super().prompt_logprobs_per_token() + (1 + (self.logprobs or 0) if echo_logprobs else 0)

    def prompts(self) -> list[str | list[int]]:
        """The prompts as a list, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(cast("list[str] | list[list[int]]", self.prompt))


class TextPart(RequestBody):
    type: Literal["text"]
    text: Text


class Message(RequestBody):
    role: Literal["system", "user", "assistant"]
    content: Text | FailFastList[TextPart]
    reasoning_content: Text | None = Field(
        default=None,
        description="Reasoning of an earlier assistant message. Accepted and ignored: it is not part of the prompt.",
    )


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[FailFastList[Message], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="The conversation so far."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None,
        description="Maximum number of tokens to generate. Defaults to the rest of the maximum context length.",
    )
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="Deprecated alias of `max_completion_tokens`."
    )
    logprobs: bool | None = Field(default=False, description="Return the log-probability of each generated token.")
    top_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Number of most likely tokens to return at each position. Requires `logprobs`.",
    )

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens is an alias of max_completion_tokens; the two must not differ")
        return self

    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens found in the prefix cache.")


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(BaseModel):
    """A candidate for one prompt token, in vLLM's format."""

    logprob: float
    rank: int | None = Field(
        description="1 is the most likely token; null if the token is not among the 20 that are ranked."
    )
    decoded_token: str


PromptLogprobsJson = list[dict[str, PromptLogprob] | None]
"""Candidates by token id for each prompt token; None for the first token."""


class Logprobs(BaseModel):
    """One entry per token. `text_offset` counts characters from the start of the text. The log-probability of an echoed
    prompt's first token is null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


FinishReason = Literal["stop", "length"]
StopReason = Annotated[
    int | str | None,
    Field(description="The stop string or stop token id that ended the output; null for EOS and other reasons."),
]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = None
    prompt_logprobs: Annotated[PromptLogprobsJson | None, OMIT_NONE] = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Annotated[Usage | None, OMIT_NONE] = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    reasoning_content: Annotated[str | None, OMIT_NONE] = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: StopReason = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: Annotated[PromptLogprobsJson | None, OMIT_NONE] = None


class Delta(BaseModel):
    role: Annotated[Literal["assistant"] | None, OMIT_NONE] = None
    content: Annotated[str | None, OMIT_NONE] = None
    reasoning_content: Annotated[str | None, OMIT_NONE] = None


class DeltaChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: Annotated[Usage | None, OMIT_NONE] = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jax_mla_cp"
    max_model_len: int = Field(description="Maximum context length: prompt and output tokens.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = Field(description="The request field that caused the error.")
    code: str | None


class Error(BaseModel):
    """The body of every response other than 200."""

    error: ErrorDetail
