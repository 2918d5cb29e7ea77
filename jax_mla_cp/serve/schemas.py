"""The request and response bodies: OpenAI's completions API and the extras that vLLM and SGLang made common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_PROMPTS = 128
MAX_LOGPROBS = 20


def _encodable(text: str) -> str:
    """JSON can carry half a surrogate pair; UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Stop = Annotated[Text, Field(min_length=1, max_length=1024)]


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class CompletionRequest(BaseModel):
    """POST /v1/completions. A field that is not here is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Text
    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]] = Field(
        description="text or token ids, one or many"
    )
    max_tokens: int | None = Field(default=16, ge=1)
    temperature: float | None = Field(default=1.0, ge=0, le=2, allow_inf_nan=False, description="0 is greedy")
    top_p: float | None = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=0, ge=-1, lt=2**31, description="0 or -1: off")
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
        default=None, description="at most 4 strings"
    )
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    ignore_eos: bool = False
    n: Literal[1] | None = 1
    echo: Literal[False] | None = False
    user: Text | None = None

    @model_validator(mode="after")
    def _together(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        return self

    def prompts(self) -> list[str | list[int]]:
        """One or many, each text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])


class Logprobs(BaseModel):
    """One entry per token; `text_offset` counts from the completion's start."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(BaseModel):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jax_mla_cp"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Error(BaseModel):
    """What every answer other than 200 looks like."""

    error: dict[str, Any]
