"""Text and token ids over HTTP: POST /tokenize and /detokenize, GET /tokenizer_info, in vLLM's forms."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jax_mla_cp.serve import prompts
from jax_mla_cp.serve.fields import Body, Many, Text, TokenId
from jax_mla_cp.serve.schemas import IF_SAID, MAX_MESSAGES, Message
from jax_mla_cp.serve.served import Served


class TokenizeRequest(Body):
    """Either `prompt` or `messages`."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]})

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[Many[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool = Field(default=True, description="the BOS and EOS tokens around a prompt")
    add_generation_prompt: bool = Field(default=True, description="what begins an answer, behind messages")
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("exactly one of prompt and messages is needed")
        return self


class TokenizeResponse(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: Annotated[list[str] | None, IF_SAID] = None


class DetokenizeRequest(Body):
    model: Text | None = None
    tokens: Many[TokenId]


class DetokenizeResponse(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What a client needs to write prompts itself."""

    bos_token: Annotated[str | None, IF_SAID] = None
    eos_token: Annotated[str | None, IF_SAID] = None
    unk_token: Annotated[str | None, IF_SAID] = None
    pad_token: Annotated[str | None, IF_SAID] = None
    chat_template: Annotated[str | None, IF_SAID] = None
    max_model_len: int
    vocab_size: int


def install(app: FastAPI, served: Served) -> None:
    @app.post("/tokenize", summary="Text or messages to token ids")
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        served.check_name(body.model or served.name)
        return await asyncio.to_thread(_tokenize, served, body)

    @app.post("/detokenize", summary="Token ids to text")
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        served.check_name(body.model or served.name)
        served.check_tokens(body.tokens, "tokens")
        tokenizer = served.need_tokenizer("tokens")
        return DetokenizeResponse(prompt=await asyncio.to_thread(tokenizer.decode, body.tokens))

    @app.get("/tokenizer_info", summary="Special tokens and the chat template")
    async def tokenizer_info() -> TokenizerInfo:
        tokenizer = served.need_tokenizer("tokenizer_info")
        template = tokenizer.chat_template
        known = {name: text for name, text in tokenizer.special_tokens.items() if name in TokenizerInfo.model_fields}
        return TokenizerInfo(
            **known,
            chat_template=None if template is None else template.source,
            max_model_len=served.max_model_len,
            vocab_size=served.vocab_size,
        )


def _tokenize(served: Served, body: TokenizeRequest) -> TokenizeResponse:
    if body.messages is not None:
        messages = body.messages
        tokens = prompts.encode_messages(served, messages, add_generation_prompt=body.add_generation_prompt)
    else:
        tokens = prompts.encode_text(served, body.prompt or "", wrap=body.add_special_tokens)
    names = [served.names(token) for token in tokens] if body.return_token_strs else None
    return TokenizeResponse(tokens=tokens, count=len(tokens), max_model_len=served.max_model_len, token_strs=names)
