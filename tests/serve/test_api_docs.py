"""docs/api.md lists every field of every route, and every field that is taken in its neutral value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jax_mla_cp.serve.schemas import chat, completions, generation, structured_output
from jax_mla_cp.serve.schemas.base import RequestBody
from jax_mla_cp.serve.tokens import DetokenizeRequest, TokenizeRequest, TokenizerInfo

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
NAMES = frozenset(
    name
    for line in PAGE.splitlines()
    for code in re.findall(r"`([^`]+)`", line)
    for name in re.findall(r"[a-z_]+", code)
)
BODIES: list[type[RequestBody]] = [
    chat.ChatRequest,
    chat.Message,
    chat.TextPart,
    chat.ToolCall,
    chat.CalledFunction,
    chat.Tool,
    chat.Function,
    completions.CompletionRequest,
    generation.StreamOptions,
    structured_output.JsonSchema,
    structured_output.StructuredOutputs,
    TokenizeRequest,
    DetokenizeRequest,
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.__name__)
def test_every_field_is_listed(body: type[RequestBody]) -> None:
    fields = {field.alias or name for name, field in body.model_fields.items()} | set(body.NEUTRAL)
    assert not fields - NAMES


def test_every_field_of_the_tokenizer_is_listed() -> None:
    assert not set(TokenizerInfo.model_fields) - NAMES
