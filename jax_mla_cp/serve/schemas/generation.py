"""`GenerationRequest`: the fields that completions and chat share."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from jax_mla_cp.serve.schemas.base import (
    ENCODABLE,
    MAX_LOGPROBS,
    FailFastList,
    FieldError,
    LogitBias,
    Penalty,
    RequestBody,
    StopString,
    Text,
    TokenCount,
    TokenId,
    Whole,
)
from jax_mla_cp.serve.schemas.structured_output import Choices, JsonSchemaOrText, ResponseFormat, StructuredOutputs

MAX_CHOICES = 128
"""Prompts times `n`: engine requests per HTTP request."""
MAX_STOP_STRINGS = 64
MAX_PROMPT_LOGPROBS = 4 << 20
"""Prompt log-probabilities per response. Each takes some hundred bytes until it is sent: 20 per token of a million tokens
would take ten gigabytes."""


class StreamOptions(RequestBody):
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {"include_obfuscation": (False,)}

    include_usage: bool = Field(
        default=False, description="Send a last chunk with the token usage and an empty `choices` list."
    )
    continuous_usage_stats: bool = Field(
        default=False, description="With `include_usage`: every chunk has the usage so far."
    )


class GenerationRequest(RequestBody):
    """The sampling and output fields that completions and chat share."""

    MEANINGFUL_EMPTY: ClassVar[frozenset[str]] = frozenset({"guided_json", "guided_regex"})
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "modalities": (["text"],),
        "use_beam_search": (False,),
        "length_penalty": (1,),
        "early_stopping": (False,),
        "priority": (0,),
        "detokenize": (True,),
        "best_of": (1,),
        "echo": (False,),
        "return_hidden_states": (False,),
        "no_stop_trim": (False,),
        "separate_reasoning": (True,),
        "stream_reasoning": (True,),
    }

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
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = Field(
        default=0, description="Sample from the `top_k` most likely tokens. 0 or -1 disables it."
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
    logit_bias: LogitBias | None = Field(
        default=None, description="Bias added to the logits of the given tokens: a map from token id to bias."
    )
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = Field(
        default=None,
        description="Seed for sampling. Requests with the same seed and parameters return the same output; choice i uses "
        "`seed + i`.",
    )
    n: Annotated[Whole, Field(ge=1, le=MAX_CHOICES)] | None = Field(
        default=1, description=f"Number of choices to generate for each prompt. Prompts times n: at most {MAX_CHOICES}."
    )
    stop: StopString | Annotated[FailFastList[StopString], Field(max_length=MAX_STOP_STRINGS)] | None = Field(
        default=None,
        description=f"Up to {MAX_STOP_STRINGS} strings that stop generation. The output does not contain the stop string "
        "unless `include_stop_str_in_output` is true.",
    )
    include_stop_str_in_output: bool | None = Field(
        default=False, description="End the output with the stop string or the text of the stop token."
    )
    stop_token_ids: Annotated[FailFastList[TokenId], Field(max_length=128)] | None = Field(
        default=None, description="Token ids that stop generation, in addition to the model's EOS tokens."
    )
    ignore_eos: bool | None = Field(default=False, description="Continue generating after an EOS token.")
    min_tokens: TokenCount | None = Field(
        default=0,
        description="Minimum number of tokens to generate before EOS, a stop token or a stop string is honored.",
    )
    response_format: ResponseFormat | None = Field(
        default=None,
        description="Output format: `text`, any JSON object (`json_object`), or JSON that conforms to a schema "
        "(`json_schema`).",
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="vLLM's constraints: one of `json`, `regex`, `choice`, `grammar`, `json_object`."
    )
    guided_json: JsonSchemaOrText | None = Field(default=None, description="As `structured_outputs.json`.")
    guided_regex: Text | None = Field(default=None, description="As `structured_outputs.regex`.")
    guided_choice: Choices | None = Field(default=None, description="As `structured_outputs.choice`.")
    guided_grammar: Text | None = Field(default=None, description="As `structured_outputs.grammar`.")
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        default=None,
        description="Return the log-probability of each prompt token and of this many most likely tokens at its position, "
        "in vLLM's format. Not supported with `stream`.",
    )
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = Field(
        default=None,
        description="Keep only this many tokens at the prompt's end; -1: as many as leave room for `max_tokens`.",
    )
    skip_special_tokens: bool | None = Field(
        default=True, description="Leave special tokens out of the output's text. False: they are written as spelled."
    )
    spaces_between_special_tokens: bool | None = Field(
        default=True, description="Accepted and ignored: this server never adds spaces between tokens."
    )
    return_token_ids: bool | None = Field(default=False, description="Also return the token ids of prompt and output.")
    return_tokens_as_token_ids: bool | None = Field(
        default=False, description="Write tokens in log-probabilities as `token_id:N`."
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
    safety_identifier: Text | None = Field(default=None, description="Accepted and ignored.")
    prompt_cache_key: Text | None = Field(
        default=None, description="Accepted and ignored: prefixes are found by content."
    )
    request_id: Text | None = Field(default=None, description="Accepted and ignored: see the header X-Request-Id.")

    @model_validator(mode="after")
    def _check_combinations(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "requires stream=true")
        if self.stream and self.prompt_logprobs is not None:
            raise FieldError("prompt_logprobs", "is not supported with stream=true")
        limit = self.token_limit()
        if limit is not None and (self.min_tokens or 0) > limit:
            raise FieldError("min_tokens", f"must not exceed max_tokens ({limit}), got {self.min_tokens}")
        if self.truncate_prompt_tokens == 0:
            raise FieldError("truncate_prompt_tokens", "must be -1 or at least 1, got 0")
        if len(given := list(self.constraints())) > 1:
            raise FieldError(given[1], f"an output has one constraint, got {' and '.join(given)}. Send one of them")
        return self

    @abc.abstractmethod
    def token_limit(self) -> int | None:
        """Maximum number of tokens to generate; None: up to the maximum context length."""

    def constraints(self) -> dict[str, Any]:
        """The constraints of the output's format, by the field's path."""
        found: dict[str, Any] = {}
        if self.response_format is not None and self.response_format.type != "text":
            is_schema = self.response_format.type == "json_schema"
            found["response_format.json_schema.schema" if is_schema else "response_format"] = self.response_format
        if self.structured_outputs is not None:
            for name, value in self.structured_outputs.constraints().items():
                found[f"structured_outputs.{name}"] = value
        for name in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
            if (value := getattr(self, name)) is not None:
                found[name] = value
        return found

    def grammar_field(self) -> str | None:
        """The field for which a grammar has to be compiled; None: there is none."""
        return next(iter(self.constraints()), None)

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

    def has_continuous_usage(self) -> bool:
        options = self.stream_options
        return options is not None and options.include_usage and options.continuous_usage_stats
