"""Text to ids and back: BOS and EOS exactly once, streams that never end within a code point."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from jax_mla_cp.tokenizer import Detokenizer, JsonVocabulary, Tokenizer, TokenizerError, require_tokenizer

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


def saved(directory: Path, backend: tokenizers.Tokenizer, **config: Any) -> Tokenizer:
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return require_tokenizer(Tokenizer.from_dir(directory, 1000))


@pytest.mark.parametrize("template", [None, ("<s>", "$A"), ("<s>", "$A", "</s>"), ("$A", "</s>")])
@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_bos_and_eos_exactly_once(
    tmp_path: Path, template: tuple[str, ...] | None, bos: bool | None, eos: bool | None
) -> None:
    flags = {key: flag for key, flag in (("add_bos_token", bos), ("add_eos_token", eos)) if flag is not None}
    backend = byte_level(template=template)
    tokenizer = saved(tmp_path, backend, bos_token="<s>", eos_token={"content": "</s>", "lstrip": False}, **flags)
    has_bos = bos if bos is not None else "<s>" in (template or ())
    has_eos = eos if eos is not None else "</s>" in (template or ())
    first, last = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    for text in ("hello world", "", "日本"):
        bare = backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == [first] * has_bos + bare + [last] * has_eos
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_same_ids_as_transformers(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = saved(tmp_path, byte_level(template=("<s>", "$A")), bos_token="<s>")
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in CORPUS:
        assert tokenizer.encode(text) == theirs.encode(text)


def test_no_padding_and_no_truncation(tmp_path: Path) -> None:
    backend = byte_level()
    bare = backend.encode("hello world " * 9).ids
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    assert saved(tmp_path, backend).encode("hello world " * 9) == bare


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = Detokenizer(tokenizer)
    return [*(stream.add(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("text", [*CORPUS[:4], "👩‍👩‍👧" * 50, "e\u0301 \ufffd literal", "\n\n  x"])
def test_stream_of_real_text_has_no_partial_code_points(text: str) -> None:
    tokenizer = Tokenizer(JsonVocabulary(byte_level()))
    got = pieces(tokenizer, tokenizer.encode(text))
    assert "".join(got) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in got)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 340), max_size=120))
def test_any_ids_stream_to_what_decode_gives(ids: list[int]) -> None:
    assert "".join(pieces(BYTE_LEVEL, ids)) == BYTE_LEVEL.decode(ids)


BYTE_LEVEL = Tokenizer(JsonVocabulary(byte_level()))


def test_stream_is_not_held_back() -> None:
    tokenizer = Tokenizer(JsonVocabulary(byte_level()))
    stream = Detokenizer(tokenizer)
    for letter in "plain ascii":
        ids = tokenizer.encode(letter)
        assert "".join(stream.add(token) for token in ids) == letter


def test_endless_invalid_bytes_take_linear_time() -> None:
    backend = byte_level()
    bytes_ = [backend.token_to_id(letter) for letter in pre_tokenizers.ByteLevel.alphabet()]
    token = next(byte for byte in bytes_ if backend.decode([byte]) == "\ufffd")
    tokenizer, begin = Tokenizer(JsonVocabulary(backend)), time.monotonic()
    got = pieces(tokenizer, [token] * 20000)
    assert "".join(got) == tokenizer.decode([token] * 20000)
    assert time.monotonic() - begin < 20


def test_byte_fallback_streams() -> None:
    tokenizer = Tokenizer(JsonVocabulary(byte_fallback()))
    ids = [257, *(b + 1 for b in "你好😀".encode()), 258, 257, 259, *(b + 1 for b in "é".encode())]
    got = pieces(tokenizer, ids)
    assert "".join(got) == tokenizer.decode(ids) == "a你好😀b a é"
    assert not any("\ufffd" in piece for piece in got)


def test_without_tokenizer_json(tmp_path: Path) -> None:
    assert Tokenizer.from_dir(tmp_path, 100) is None
    with pytest.raises(TokenizerError, match="token ids"):
        require_tokenizer(None)


def test_token_beyond_the_models_vocabulary(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"token '</s>' has id \d+, but the model's vocab_size is 300"):
        Tokenizer.from_dir(tmp_path, 300)


@pytest.mark.parametrize("bos", [{}, {"bos_token": None}, {"bos_token": "<no>"}, {"bos_token": {"content": "<no>"}}])
def test_flag_without_its_token(tmp_path: Path, bos: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="add_bos_token is true, but bos_token"):
        saved(tmp_path, byte_level(), add_bos_token=True, **bos)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_damaged_files(tmp_path: Path, name: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text("{ not json")
    with pytest.raises(TokenizerError, match=name):
        Tokenizer.from_dir(tmp_path, 1000)
