"""Request fields that completions and chat share, and the types of their values."""

from __future__ import annotations

import abc
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_CHOICES = 128
"""Prompts times `n`: engine requests per HTTP request."""
MAX_N = 8
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_PROMPT_LOGPROBS = 4 << 20
"""Prompt log-probabilities per response. Each takes some hundred bytes until it is sent: 20 per token of a million tokens
would take ten gigabytes."""


def _encodable(text: str) -> str:
    """Rejects lone surrogates, which JSON can carry and UTF-8 can't."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode, without lone surrogates") from None
    return text


def _check_bias_count(biases: object) -> object:
    """Checks the number of entries first: pydantic would build an error of a few hundred bytes for each bad entry."""
    if isinstance(biases, dict) and len(biases) > MAX_LOGIT_BIASES:
        raise ValueError(f"must have at most {MAX_LOGIT_BIASES} entries, not {len(biases)}")
    return biases


T = TypeVar("T")
FailFastList = Annotated[list[T], Field(fail_fast=True)]
"""A list whose validation stops at the first bad element: otherwise a body of a few megabytes with a million bad elements
would produce a kilobyte of errors for each."""
ENCODABLE = AfterValidator(_encodable)
Text = Annotated[str, ENCODABLE]
TokenId = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
StopString = Annotated[str, Field(min_length=1, max_length=1024), ENCODABLE]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
TokenCount = Annotated[int, Field(ge=0, lt=2**31)]


class RequestBody(BaseModel):
    """A request body. Unknown fields are rejected, and values are not coerced to another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, value: Any) -> Any:
        """Keeps only one unknown field: it is enough to reject the request, and a million would each add an error."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in value if name not in known)
        return {name: part for name, part in value.items() if name in known or name == unknown}


class StreamOptions(RequestBody):
    include_usage: bool = Field(
        default=False, description="Send a last chunk with the token usage and an empty `choices` list."
    )


class JsonSchema(RequestBody):
    name: Annotated[str, Field(min_length=1, max_length=64), ENCODABLE] = Field(
        description="Name of the schema. Accepted and ignored."
    )
    description: Text | None = Field(default=None, description="Accepted and ignored.")
    schema_: dict[str, Any] = Field(
        alias="schema", description="The JSON Schema, limited to the features that llguidance supports."
    )
    strict: bool | None = Field(
        default=None, description="Accepted and ignored: the output always conforms to the schema."
    )


class TextFormat(RequestBody):
    type: Literal["text"]


class JsonFormat(RequestBody):
    type: Literal["json_object"]


class SchemaFormat(RequestBody):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonFormat | SchemaFormat, Field(discriminator="type")]


class GenerationRequest(RequestBody):
    """The sampling and output fields that completions and chat share."""

    model: Text = Field(description="Name of the model, as listed by GET /v1/models.")
    temperature: float | None = Field(
        default=1.0, ge=0, le=2, allow_inf_nan=False, description="Sampling temperature. 0 means greedy decoding."
    )
    top_p: float | None = Field(
        default=1.0,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Nucleus sampling: sample from the smallest set of most likely tokens whose probabilities add up to "
        "`top_p`.",
    )
    top_k: int | None = Field(
        default=0, ge=-1, lt=2**31, description="Sample from the `top_k` most likely tokens. 0 or -1 disables it."
    )
    min_p: float | None = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Minimum probability of a token, relative to that of the most likely token. 0 disables it.",
    )
    presence_penalty: Penalty | None = Field(
        default=0.0, description="Subtracted from the logit of every token that has been generated at least once."
    )
    frequency_penalty: Penalty | None = Field(
        default=0.0, description="Subtracted from a token's logit once for each time it has been generated."
    )
    repetition_penalty: float | None = Field(
        default=1.0,
        ge=1e-4,
        le=1e4,
        allow_inf_nan=False,
        description="Penalizes tokens that occur in the prompt or the output: their positive logits are divided by it, "
        "their negative logits multiplied. Values above 1 discourage repetition.",
    )
    logit_bias: (
        Annotated[dict[TokenKey, Bias], Field(max_length=MAX_LOGIT_BIASES), BeforeValidator(_check_bias_count)] | None
    ) = Field(default=None, description="Bias added to the logits of the given tokens: a map from token id to bias.")
    seed: int | None = Field(
        default=None,
        ge=-(2**63),
        lt=2**63,
        description="Seed for sampling. Requests with the same seed and parameters return the same output; choice i uses "
        "`seed + i`.",
    )
    n: int | None = Field(default=1, ge=1, le=MAX_N, description="Number of choices to generate for each prompt.")
    stop: StopString | Annotated[FailFastList[StopString], Field(max_length=4)] | None = Field(
        default=None,
        description="Up to 4 strings that stop generation. The output does not contain the stop string.",
    )
    stop_token_ids: Annotated[FailFastList[TokenId], Field(max_length=128)] | None = Field(
        default=None, description="Token ids that stop generation, in addition to the model's EOS tokens."
    )
    ignore_eos: bool = Field(default=False, description="Continue generating after an EOS token.")
    min_tokens: TokenCount | None = Field(
        default=0,
        description="Minimum number of tokens to generate before EOS, a stop token or a stop string is honored.",
    )
    response_format: ResponseFormat | None = Field(
        default=None,
        description="Output format: `text`, any JSON object (`json_object`), or JSON that conforms to a schema "
        "(`json_schema`).",
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Return the log-probability of each prompt token and of this many most likely tokens at its position, "
        "in vLLM's format. Not supported with `stream`.",
    )
    skip_special_tokens: Literal[True] | None = Field(
        default=True, description="Only true is supported: special tokens never appear in the output text."
    )
    stream: bool | None = Field(default=False, description="Stream the output as server-sent events.")
    stream_options: StreamOptions | None = Field(default=None, description="Options for `stream`.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=256), ENCODABLE] | None = Field(
        default=None, description="Share cached prefixes only with requests that send the same salt."
    )
    user: Text | None = Field(default=None, description="Accepted and ignored.")
    metadata: dict[str, Any] | None = Field(default=None, description="Accepted and ignored.")
    store: bool | None = Field(default=None, description="Accepted and ignored.")
    service_tier: Text | None = Field(default=None, description="Accepted and ignored.")

    @model_validator(mode="after")
    def _check_combinations(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream=true")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs is not supported with stream=true")
        limit = self.token_limit()
        if limit is not None and (self.min_tokens or 0) > limit:
            raise ValueError(f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({limit})")
        return self

    @abc.abstractmethod
    def token_limit(self) -> int | None:
        """Maximum number of tokens to generate; None: up to the maximum context length."""

    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    def logit_bias_by_id(self) -> dict[int, float]:
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    def needs_prompt_logprobs(self) -> bool:
        """True if the engine has to compute the prompt's log-probabilities."""
        return self.prompt_logprobs is not None

    def prompt_logprobs_per_token(self) -> int:
        """Log-probabilities in the response for each prompt token."""
        return 0 if self.prompt_logprobs is None else 1 + self.prompt_logprobs
