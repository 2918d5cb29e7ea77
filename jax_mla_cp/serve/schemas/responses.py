"""Response bodies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

OMIT_NONE = Field(exclude_if=lambda value: value is None)
"""For response fields that are left out when they are None."""
TokenIds = Annotated[list[int] | None, OMIT_NONE]
"""With `return_token_ids`."""


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


FinishReason = Literal["stop", "length", "tool_calls"]
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
    prompt_token_ids: TokenIds = None
    token_ids: TokenIds = None


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


class FunctionCall(BaseModel):
    name: str
    arguments: str = Field(description="The text of a JSON object, as the model wrote it.")


class ToolCallResult(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None = Field(description="null if the answer has only tool calls, or ended inside of its reasoning.")
    reasoning_content: Annotated[str | None, OMIT_NONE] = None
    tool_calls: Annotated[list[ToolCallResult] | None, OMIT_NONE] = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: StopReason = None
    token_ids: TokenIds = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: Annotated[PromptLogprobsJson | None, OMIT_NONE] = None
    prompt_token_ids: TokenIds = None


class FunctionDelta(BaseModel):
    name: Annotated[str | None, OMIT_NONE] = None
    arguments: str


class ToolCallDelta(BaseModel):
    """A part of a call. The first part has id, type and name."""

    index: int
    id: Annotated[str | None, OMIT_NONE] = None
    type: Annotated[Literal["function"] | None, OMIT_NONE] = None
    function: FunctionDelta


class Delta(BaseModel):
    role: Annotated[Literal["assistant"] | None, OMIT_NONE] = None
    content: Annotated[str | None, OMIT_NONE] = None
    reasoning_content: Annotated[str | None, OMIT_NONE] = None
    tool_calls: Annotated[list[ToolCallDelta] | None, OMIT_NONE] = None


class DeltaChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: StopReason = None
    token_ids: TokenIds = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[DeltaChoice]
    usage: Annotated[Usage | None, OMIT_NONE] = None
    prompt_token_ids: TokenIds = None


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
