"""Small tokenizers of each kind, trained on the spot."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import tokenizers
from tiktoken._educational import bpe_train
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jax_mla_cp.tokenizer import JsonVocabulary, KimiVocabulary, Tokenizer
from jax_mla_cp.tokenizer.kimi import PATTERN

CORPUS = ["hello world, héllo wörld", "日本語のテキスト 你好 世界", "emoji 👩‍👩‍👧 😀😃", "the quick brown fox"] * 4


def byte_level(*, template: tuple[str, ...] | None = None) -> tokenizers.Tokenizer:
    """A byte-level BPE with merges, so that tokens end within code points; ids: all bytes, merges, <s>, </s>."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(["<s>", "</s>"])
    if template:
        special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single=" ".join(template), special_tokens=special)
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """Llama's kind: words with a leading space, and byte tokens for what is in no word."""
    vocab = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(256)}, "▁a": 257, "b": 258, "▁": 259}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def with_markers(
    backend: tokenizers.Tokenizer, *, special: Collection[str] = ("<s>", "<|call|>")
) -> tokenizers.Tokenizer:
    """Adds <s>, <|call|> and <think>; `special` says which ones are special tokens."""
    for name in ("<s>", "<|call|>", "<think>"):
        backend.add_tokens([tokenizers.AddedToken(name, special=name in special, normalized=False)])
    return backend


# As Kimi-K2's: the special tokens' places behind the BPE's tokens.
KIMI_SPECIALS = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    9: "[EOT]",
    10: "<|im_system|>",
    11: "<|tool_calls_section_begin|>",
    17: "<|im_middle|>",
    254: "[UNK]",
    255: "[PAD]",
}


@functools.cache
def kimi_ranks() -> dict[bytes, int]:
    """A BPE of 330 tokens, with merges in and across code points."""
    return bpe_train(" ".join(CORPUS), 330, "(?V1)" + PATTERN, visualise=None)


def kimi_settings(**changes: Any) -> dict[str, Any]:
    """tokenizer_config.json with the keys of Kimi-K2's."""
    first = len(kimi_ranks())
    return {
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "additional_special_tokens": [
            "<|im_end|>",
            "<|im_user|>",
            "<|im_assistant|>",
            "<|im_system|>",
            "<|im_middle|>",
        ],
        "added_tokens_decoder": {
            str(first + i): {
                "content": name,
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
                "special": not name.startswith("<|tool"),
            }
            for i, name in KIMI_SPECIALS.items()
        },
        **changes,
    }


def kimi() -> KimiVocabulary:
    return KimiVocabulary(kimi_ranks(), kimi_settings())


def save_kimi(directory: Path, ranks: dict[bytes, int] | None = None, **changes: Any) -> None:
    """The files of a Kimi checkpoint's tokenizer."""
    lines = [base64.b64encode(token) + b" %d" % rank for token, rank in (ranks or kimi_ranks()).items()]
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    (directory / "tokenizer_config.json").write_text(json.dumps(kimi_settings(**changes)))


def save_json(directory: Path, backend: tokenizers.Tokenizer, **config: Any) -> None:
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


BYTE_LEVEL = Tokenizer(JsonVocabulary(byte_level()))
BYTE_FALLBACK = Tokenizer(JsonVocabulary(byte_fallback()))
KIMI = Tokenizer(kimi())
