"""Tokenization routes in vLLM's format: POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

import asyncio
from typing import Annotated, ClassVar

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jax_mla_cp.serve import preprocessing
from jax_mla_cp.serve.schemas.base import FailFastList, FieldError, JsonObject, RequestBody, Text, TokenId
from jax_mla_cp.serve.schemas.chat import MAX_MESSAGES, MAX_TOOLS, Message, Tool
from jax_mla_cp.serve.schemas.responses import OMIT_NONE
from jax_mla_cp.serve.served_model import ServedModel


class TokenizeRequest(RequestBody):
    """Either `prompt` or `messages`."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    MEANINGFUL_EMPTY: ClassVar[frozenset[str]] = frozenset({"prompt", "messages"})

    model: Text | None = None
    prompt: Text | None = Field(default=None, description="Text to tokenize.")
    messages: Annotated[FailFastList[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = Field(
        default=None, description="Conversation to format with the chat template and tokenize."
    )
    tools: Annotated[FailFastList[Tool], Field(max_length=MAX_TOOLS)] | None = Field(
        default=None, description="Functions that the model may call, for the chat template."
    )
    chat_template_kwargs: JsonObject | None = Field(
        default=None, description="Further variables of the chat template; JSON values."
    )
    add_special_tokens: bool | None = Field(
        default=None,
        description="Add BOS and EOS, as the tokenizer's configuration says. Default: true for `prompt`, false for `messages`.",
    )
    add_generation_prompt: bool | None = Field(
        default=None,
        description="End `messages` with the chat template's start of an assistant message (default: true).",
    )
    continue_final_message: bool | None = Field(
        default=False, description="End `messages` within the last message, an assistant's."
    )
    return_token_strs: bool | None = Field(default=False, description="Also return the text of each token.")

    @model_validator(mode="after")
    def _check_one_input(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise FieldError("prompt", "exactly one of prompt and messages is required")
        for name in ("tools", "chat_template_kwargs", "continue_final_message"):
            if self.messages is None and getattr(self, name):
                raise FieldError(name, "requires messages")
        if self.continue_final_message and self.add_generation_prompt:
            raise FieldError("continue_final_message", "can't be combined with add_generation_prompt=true")
        return self


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: Annotated[list[str] | None, OMIT_NONE] = None


class DetokenizeRequest(RequestBody):
    model: Text | None = None
    tokens: FailFastList[TokenId]


class DetokenizeResponse(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """The tokenizer's special tokens, chat template and sizes."""

    bos_token: Annotated[str | None, OMIT_NONE] = None
    eos_token: Annotated[str | None, OMIT_NONE] = None
    unk_token: Annotated[str | None, OMIT_NONE] = None
    pad_token: Annotated[str | None, OMIT_NONE] = None
    chat_template: Annotated[str | None, OMIT_NONE] = None
    max_model_len: int
    vocab_size: int


def install(app: FastAPI, served: ServedModel) -> None:
    @app.post("/tokenize", summary="Tokenize text or messages")
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        served.check_model_name(body.model or served.name)
        return await asyncio.to_thread(_tokenize, served, body)

    @app.post("/detokenize", summary="Convert token ids to text")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        served.check_model_name(body.model or served.name)
        served.check_token_ids(body.tokens, "tokens")
        tokenizer = served.require_tokenizer("tokens")
        return DetokenizeResponse(prompt=await asyncio.to_thread(tokenizer.decode, body.tokens))

    @app.get("/tokenizer_info", summary="Get the special tokens and the chat template")
    async def tokenizer_info() -> TokenizerInfo:
        tokenizer = served.require_tokenizer("tokenizer_info")
        template = tokenizer.chat_template
        known = {name: text for name, text in tokenizer.special_tokens.items() if name in TokenizerInfo.model_fields}
        return TokenizerInfo(
            **known,
            chat_template=None if template is None else template.source,
            max_model_len=served.max_model_len,
            vocab_size=served.vocab_size,
        )


def _tokenize(served: ServedModel, body: TokenizeRequest) -> TokenizeResponse:
    if body.messages is not None:
        tokens = preprocessing.encode_messages(
            served,
            body.messages,
            tools=[tool.plain() for tool in body.tools or ()],
            variables=body.chat_template_kwargs,
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            add_special_tokens=bool(body.add_special_tokens),
        )
    else:
        special = body.add_special_tokens is not False
        tokens = preprocessing.encode_text(served, body.prompt or "", add_special_tokens=special)
    texts = [served.token_texts(token) for token in tokens] if body.return_token_strs else None
    return TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=served.max_model_len, token_strs=texts)
