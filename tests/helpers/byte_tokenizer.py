"""The simplest tokenizer: token i is byte i of the text's UTF-8, and a prompt begins with BOS."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jax_mla_cp.tokenizer import JsonVocabulary, Tokenizer

BOS, EOS = 256, 257


def byte_tokenizer() -> Tokenizer:
    return Tokenizer(JsonVocabulary(byte_backend()), prefix=[BOS])


def byte_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=_byte_letters(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|bos|>", "<|eos|>"])
    return backend


def _byte_letters() -> dict[str, int]:
    """The printable letter that stands for each byte in byte-level BPE (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
