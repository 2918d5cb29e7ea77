"""`CompletionRequest`: the body of POST /v1/completions."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, cast

from pydantic import Field, model_validator

from jax_mla_cp.serve.schemas.base import MAX_LOGPROBS, FailFastList, FieldError, Text, TokenCount, TokenId, Whole
from jax_mla_cp.serve.schemas.generation import MAX_CHOICES, GenerationRequest


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    MEANINGFUL_NULL: ClassVar[frozenset[str]] = frozenset({"max_tokens"})

    prompt: (
        Text
        | Annotated[FailFastList[Text], Field(max_length=MAX_CHOICES)]
        | FailFastList[TokenId]
        | Annotated[FailFastList[FailFastList[TokenId]], Field(max_length=MAX_CHOICES)]
    ) = Field(description="The prompt or prompts: a string, a list of token ids, or a list of either.")
    max_tokens: TokenCount | None = Field(
        default=16,
        description="Maximum number of tokens to generate. 0 is allowed with `echo`; null means up to the maximum context "
        "length.",
    )
    add_special_tokens: bool | None = Field(
        default=True, description="Add BOS and EOS to text prompts, as the tokenizer's configuration says."
    )
    logprobs: Annotated[Whole, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        default=None,
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
            raise FieldError("max_tokens", "must be at least 1 unless echo is true, got 0")
        if self.best_of and (self.n or 1) > 1:
            raise FieldError("best_of", "must not be less than n, and only best_of=1 is supported. Omit best_of")
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
