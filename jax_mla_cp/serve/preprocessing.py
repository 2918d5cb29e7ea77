"""Request preprocessing: tokenization and length checks, before the engine sees a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jax_mla_cp.serve.errors import ApiError
from jax_mla_cp.serve.schemas.chat import ChatRequest, Message
from jax_mla_cp.serve.schemas.completions import CompletionRequest
from jax_mla_cp.serve.schemas.generation import MAX_CHOICES, MAX_PROMPT_LOGPROBS, GenerationRequest
from jax_mla_cp.serve.served_model import ServedModel
from jax_mla_cp.tokenizer import TokenizerError

_OWN_VARIABLES = frozenset(
    {
        *("messages", "conversation", "tools", "documents", "chat_template", "tokenize"),
        *("add_generation_prompt", "add_special_tokens", "continue_final_message"),
    }
)
"""Variables that `chat_template_kwargs` can't set: the server's own, and arguments of transformers' `apply_chat_template`
(CVE-2025-62426)."""


def encode_text(served: ServedModel, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Tokenizes a prompt; `add_special_tokens` adds BOS and EOS as the tokenizer does. Raises 400 if the tokenizer rejects the text."""
    tokenizer = served.require_tokenizer("prompt")
    try:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except TokenizerError as error:
        raise ApiError(400, f"prompt: {error.message}", param="prompt") from error


def encode_messages(
    served: ServedModel,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    add_special_tokens: bool = False,
) -> list[int]:
    """Tokenizes a conversation.

    Args:
      variables: further variables of the chat template.

    Raises:
      ApiError: 400: the model has no chat template, the template rejects the messages or has no place for a part of them, or a
        variable is the server's own.
    """
    tokenizer = served.require_tokenizer("messages")
    for name in variables or ():
        if name in _OWN_VARIABLES or name in tokenizer.special_tokens:
            message = f"chat_template_kwargs.{ascii(name)[1:-1]}: the server sets this variable. Leave it out."
            raise ApiError(400, message, param=f"chat_template_kwargs.{ascii(name)[1:-1]}")
    try:
        return tokenizer.encode_chat(
            [message.for_template() for message in messages],
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            add_special_tokens=add_special_tokens,
            **(variables or {}),
        )
    except TokenizerError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error
    except ValueError as error:  # it begins with the field
        raise ApiError(400, str(error), param=str(error).partition(":")[0]) from error


def encode_chat_request(served: ServedModel, body: ChatRequest) -> list[int]:
    """Tokenizes a chat request's conversation. Raises as `encode_messages`."""
    effort = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    ids = encode_messages(
        served,
        body.messages,
        tools=body.plain_tools,
        variables={**effort, **(body.chat_template_kwargs or {})},
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        add_special_tokens=bool(body.add_special_tokens),
    )
    return _truncate(served, body, ids)


def encode_prompts(served: ServedModel, body: CompletionRequest) -> list[list[int]]:
    """Tokenizes a completion's prompts. Raises 400 for too many prompts, and as `encode_text`."""
    prompts = body.prompts()
    max_prompts = MAX_CHOICES // (body.n or 1)
    if not 1 <= len(prompts) <= max_prompts:
        message = f"prompt: 1 to {max_prompts} prompts are allowed with n={body.n or 1}, got {len(prompts)}."
        raise ApiError(400, message, param="prompt")
    special = body.add_special_tokens is not False
    encoded = [
        (encode_text(served, p, add_special_tokens=special) if p else []) if isinstance(p, str) else list(p)
        for p in prompts
    ]
    return [_truncate(served, body, ids) for ids in encoded]


def _truncate(served: ServedModel, body: GenerationRequest, ids: list[int]) -> list[int]:
    """Keeps the end of a prompt, as `truncate_prompt_tokens` asks."""
    count = body.truncate_prompt_tokens
    if count is None:
        return ids
    if count < 0:
        limit = body.token_limit()
        count = served.max_model_len - (1 if limit is None else limit)
    # Without any room, `check_request` says what is too long.
    return ids[-count:] if count > 0 else ids


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
                f"This model's maximum context length is {served.max_model_len} tokens, but the request needs "
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
