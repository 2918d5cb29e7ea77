"""The fields that both completion requests have, and the types of their values."""

from __future__ import annotations

import abc
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_CHOICES = 128
"""Prompts times `n`: requests to the engine that one HTTP request may become."""
MAX_N = 8
MAX_LOGPROBS = 20
MAX_BIASES = 1024
MAX_PROMPT_SCORES = 4 << 20
"""Log-probabilities of prompts in one answer. Each takes some hundred bytes until it is sent: 20 of each token of a million
tokens would take ten gigabytes."""


def _encodable(text: str) -> str:
    """JSON can carry half a surrogate pair; UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    return text


def _few(biases: object) -> object:
    """pydantic counts a dict's entries only behind a complaint about each, which costs a few hundred bytes."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"must have at most {MAX_BIASES} entries, not {len(biases)}")
    return biases


T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list that is refused at its first bad element: without that, a body of a few megabytes makes a complaint of a
kilobyte for each of a million elements."""
ENCODABLE = AfterValidator(_encodable)
Text = Annotated[str, ENCODABLE]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1024), ENCODABLE]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """A request body. A field that is not there is refused, and no value is made into one of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        """Keeps one of the fields that are not there: it is refused for that one as well as for a million."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in value if name not in known)
        return {name: part for name, part in value.items() if name in known or name == unknown}


class StreamOptions(Body):
    include_usage: bool = Field(default=False, description="a last chunk with the usage and no choices")


class JsonSchema(Body):
    name: Annotated[str, Field(min_length=1, max_length=64), ENCODABLE] = Field(description="without effect")
    description: Text | None = Field(default=None, description="without effect")
    schema_: dict[str, Any] = Field(alias="schema", description="JSON Schema, as far as llguidance supports it")
    strict: bool | None = Field(default=None, description="without effect: answers always follow the schema")


class TextFormat(Body):
    type: Literal["text"]


class JsonFormat(Body):
    type: Literal["json_object"]


class SchemaFormat(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class Generation(Body):
    """How an answer is made: what completions and chat have in common."""

    model: Text = Field(description="the name that GET /v1/models tells")
    temperature: float | None = Field(default=1.0, ge=0, le=2, allow_inf_nan=False, description="0 is greedy")
    top_p: float | None = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=0, ge=-1, lt=2**31, description="0 or -1: off")
    min_p: float | None = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="tokens below this share of the likeliest are not drawn",
    )
    presence_penalty: Penalty | None = Field(default=0.0, description="off each logit that the answer already has")
    frequency_penalty: Penalty | None = Field(default=0.0, description="the same, for each time that it has it")
    repetition_penalty: float | None = Field(
        default=1.0,
        ge=1e-4,
        le=1e4,
        allow_inf_nan=False,
        description="divides the logits of what prompt and answer have",
    )
    logit_bias: Annotated[dict[TokenKey, Bias], Field(max_length=MAX_BIASES), BeforeValidator(_few)] | None = Field(
        default=None, description="added to logits, by token id"
    )
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**63, description="the same seed gives the same answer; choice i takes seed + i"
    )
    n: int | None = Field(default=1, ge=1, le=MAX_N, description="choices per prompt")
    stop: Stop | Annotated[Many[Stop], Field(max_length=4)] | None = Field(
        default=None, description="at most 4 strings; the answer ends before them"
    )
    stop_token_ids: Annotated[Many[TokenId], Field(max_length=128)] | None = Field(
        default=None, description="tokens that end the answer, beside the model's own"
    )
    ignore_eos: bool = Field(default=False, description="the model's own end tokens don't end the answer")
    min_tokens: Count | None = Field(default=0, description="before so many tokens nothing ends the answer")
    response_format: ResponseFormat | None = None
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="the prompt's log-probabilities, in vLLM's form; not with stream",
    )
    skip_special_tokens: Literal[True] | None = Field(default=True, description="special tokens are never text")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256), ENCODABLE] | None = Field(
        default=None, description="cached prefixes are shared only among requests with the same salt"
    )
    user: Text | None = Field(default=None, description="without effect, as the next three")
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Text | None = None

    @model_validator(mode="after")
    def _together(self) -> Generation:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only for stream=true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not for stream=true")
        limit = self.limit()
        if limit is not None and (self.min_tokens or 0) > limit:
            raise ValueError(f"min_tokens is {self.min_tokens}, but at most {limit} tokens are asked for")
        return self

    @abc.abstractmethod
    def limit(self) -> int | None:
        """Most tokens of an answer; None: what fits."""

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def biases(self) -> dict[int, float]:
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are needed."""
        return self.prompt_logprobs is not None

    def scores_per_token(self) -> int:
        """Log-probabilities that the answer has for each token of the prompt."""
        return 0 if self.prompt_logprobs is None else 1 + self.prompt_logprobs
