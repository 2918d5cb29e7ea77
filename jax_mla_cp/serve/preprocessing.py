"""Request preprocessing: tokenization, length checks and grammar compilation, before the engine sees a request."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.fields import MAX_CHOICES, MAX_PROMPT_LOGPROBS, GenerationRequest, SchemaFormat, TextFormat
from jax_mla_cp.serve.grammar import JsonGrammar
from jax_mla_cp.serve.schemas import CompletionRequest, Message
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.tokenizer import TokenizerError


def encode_text(served: ServedModel, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Tokenizes a prompt; `add_special_tokens` adds BOS and EOS as the tokenizer does. Raises 400 if the tokenizer rejects the text."""
    tokenizer = served.require_tokenizer("prompt")
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except TokenizerError as error:
        raise ApiError(400, f"prompt: {error.message}", param="prompt") from error


def encode_messages(
    served: ServedModel, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[int]:
    """Tokenizes a conversation. Raises 400 if the model has no chat template or the template rejects the messages."""
    plain = [message.model_dump(include={"role", "content"}) for message in messages]
    try:
        return served.require_tokenizer("messages").encode_chat(plain, add_generation_prompt=add_generation_prompt)
    except (TokenizerError, ValueError) as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error


def encode_prompts(served: ServedModel, body: CompletionRequest) -> list[list[int]]:
    """Tokenizes a completion's prompts. Raises 400 for too many prompts, and as `encode_text`."""
    prompts = body.prompts()
    max_prompts = MAX_CHOICES // (body.n or 1)
    if not 1 <= len(prompts) <= max_prompts:
        message = f"prompt: 1 to {max_prompts} prompts are allowed with n={body.n or 1}, got {len(prompts)}."
        raise ApiError(400, message, param="prompt")
    return [(encode_text(served, p) if p else []) if isinstance(p, str) else list(p) for p in prompts]


def check_request(served: ServedModel, body: GenerationRequest, prompts: Sequence[Sequence[int]], param: str) -> None:
    """Raises 400 for a request that the model can't serve: too long, or with token ids that it doesn't have.

    Args:
      param: the field that the prompts come from.
    """
    limit = body.token_limit()
    max_tokens = 1 if limit is None else limit
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, f"{param}: must not be empty.", param=param)
        served.check_token_ids(prompt, param)
        if len(prompt) + max_tokens > served.max_model_len:
            message = (
                f"The model's maximum context length is {served.max_model_len} tokens, but the request needs "
                f"{len(prompt) + max_tokens}: {len(prompt)} in {param} and {max_tokens} for max_tokens. "
                f"Shorten {param} or lower max_tokens."
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        if (min_tokens := body.min_tokens or 0) > served.max_model_len - len(prompt):
            message = (
                f"min_tokens: {len(prompt)} prompt tokens and {min_tokens} more exceed the model's maximum context "
                f"length of {served.max_model_len}."
            )
            raise ApiError(400, message, param="min_tokens", code="context_length_exceeded")
    logprobs = sum(map(len, prompts)) * (body.n or 1) * body.prompt_logprobs_per_token()
    if logprobs > MAX_PROMPT_LOGPROBS:
        field = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        message = (
            f"{field}: the response would contain {logprobs} prompt log-probabilities; the limit is "
            f"{MAX_PROMPT_LOGPROBS}. Send fewer prompts per request, or lower {field}."
        )
        raise ApiError(400, message, param=field)
    served.check_token_ids(body.stop_token_ids or (), "stop_token_ids")
    served.check_token_ids(list(body.logit_bias_by_id()), "logit_bias")
    if body.stop_strings() and served.tokenizer is None:
        message = "stop: this model has no tokenizer, so it can't match stop strings. Use stop_token_ids."
        raise ApiError(400, message, param="stop")


def compile_grammar(served: ServedModel, body: GenerationRequest) -> JsonGrammar | None:
    """The grammar of `response_format`; None: free text. Raises 400 for a schema that can't be compiled."""
    response_format = body.response_format
    if response_format is None or isinstance(response_format, TextFormat):
        return None
    schema = response_format.json_schema.schema_ if isinstance(response_format, SchemaFormat) else {"type": "object"}
    try:
        return served.grammars.compile(schema)
    except GrammarError as error:
        raise ApiError(400, f"response_format: {error}", param="response_format") from error
