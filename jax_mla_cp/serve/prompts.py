"""What a request asks, as far as it can be checked before the engine has it: token ids, lengths, the answer's format."""

from __future__ import annotations

from collections.abc import Sequence

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.fields import MAX_CHOICES, MAX_PROMPT_SCORES, Generation, SchemaFormat, TextFormat
from jax_mla_cp.serve.grammar import JsonGrammar
from jax_mla_cp.serve.schemas import CompletionRequest, Message
from jax_mla_cp.serve.served import Served
from jax_mla_cp.tokenizer import TokenizerError


def encode_text(served: Served, text: str, *, wrap: bool = True) -> list[int]:
    """Token ids of a prompt. Raises an `ApiError` if the tokenizer refuses it."""
    tokenizer = served.need_tokenizer("prompt")
    try:
        return tokenizer.encode(text, wrap=wrap)
    except TokenizerError as error:
        raise ApiError(400, f"prompt: {error.message}", param="prompt") from error


def encode_messages(served: Served, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """Token ids of a conversation. Raises an `ApiError` if there is no template or it refuses the messages."""
    plain = [message.model_dump(include={"role", "content"}) for message in messages]
    try:
        return served.need_tokenizer("messages").encode_chat(plain, add_generation_prompt=add_generation_prompt)
    except (TokenizerError, ValueError) as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error


def completion_prompts(served: Served, body: CompletionRequest) -> list[list[int]]:
    """The token ids of a completion's prompts. Raises an `ApiError` for too many, or what `encode_text` refuses."""
    prompts = body.prompts()
    most = MAX_CHOICES // (body.n or 1)
    if not 1 <= len(prompts) <= most:
        message = f"prompt: 1 to {most} prompts are allowed with n={body.n or 1}, got {len(prompts)}."
        raise ApiError(400, message, param="prompt")
    return [(encode_text(served, p) if p else []) if isinstance(p, str) else list(p) for p in prompts]


def check(served: Served, body: Generation, prompts: Sequence[Sequence[int]], param: str) -> None:
    """Refuses, with an `ApiError`, what the model can't take.

    Args:
      param: the field that the prompts are from.
    """
    for prompt in prompts:
        if not prompt:
            raise ApiError(400, f"{param}: must not be empty; give at least one token.", param=param)
        served.check_tokens(prompt, param)
        limit = body.limit()
        wanted = 1 if limit is None else limit
        if len(prompt) + wanted > served.max_model_len:
            message = (
                f"{param} has {len(prompt)} tokens and max_tokens is {wanted}; together they may be at most "
                f"{served.max_model_len}. Shorten the prompt or ask for fewer tokens."
            )
            raise ApiError(400, message, param=param, code="context_length_exceeded")
        if (least := body.min_tokens or 0) > served.max_model_len - len(prompt):
            message = (
                f"min_tokens: {least} tokens behind {len(prompt)} of the prompt are more than {served.max_model_len}."
            )
            raise ApiError(400, message, param="min_tokens", code="context_length_exceeded")
    scores = sum(map(len, prompts)) * (body.n or 1) * body.scores_per_token()
    if scores > MAX_PROMPT_SCORES:
        asked = "logprobs" if body.prompt_logprobs is None else "prompt_logprobs"
        message = (
            f"{asked}: the answer would have {scores} log-probabilities of prompts; at most {MAX_PROMPT_SCORES} are allowed. "
            "Send fewer prompts at a time, or ask for fewer of each token."
        )
        raise ApiError(400, message, param=asked)
    served.check_tokens(body.stop_token_ids or (), "stop_token_ids")
    served.check_tokens(list(body.biases()), "logit_bias")
    if body.stops() and served.tokenizer is None:
        raise ApiError(400, "stop: this model has no tokenizer, so its output has no text to stop at.", param="stop")


def grammar_of(served: Served, body: Generation) -> JsonGrammar | None:
    """The answer's format; None: any text. Raises an `ApiError` for a schema that can't be followed."""
    wanted = body.response_format
    if wanted is None or isinstance(wanted, TextFormat):
        return None
    schema = wanted.json_schema.schema_ if isinstance(wanted, SchemaFormat) else {"type": "object"}
    try:
        return served.grammars.compile(schema)
    except GrammarError as error:
        raise ApiError(400, f"response_format: {error}", param="response_format") from error
