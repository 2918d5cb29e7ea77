"""tokenizer.json: text to ids and back, BOS and EOS exactly once; which file is read."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from jax_mla_cp.serve.token_texts import TokenTexts
from jax_mla_cp.tokenizer import Tokenizer, TokenizerError, require_tokenizer
from tests.helpers.vocabularies import BYTE_LEVEL, CORPUS, KIMI, byte_level, save_json, save_kimi


def saved(directory: Path, backend: tokenizers.Tokenizer, **config: Any) -> Tokenizer:
    save_json(directory, backend, **config)
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


def test_from_contents(tmp_path: Path) -> None:
    settings = {"add_bos_token": True, "bos_token": "<s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    contents = byte_level().to_str().encode()
    tokenizer = Tokenizer.from_json(contents, settings, 1000)
    assert tokenizer.encode("hello") == tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    with pytest.raises(TokenizerError, match=r"tokenizer.json: token '</s>'"):
        Tokenizer.from_json(contents, settings, 300)


def test_tokenizer_json_goes_before_tiktoken_model(tmp_path: Path) -> None:
    save_kimi(tmp_path)
    kimi = require_tokenizer(Tokenizer.from_dir(tmp_path, 1000))
    assert kimi.encode("hello 世界") == KIMI.encode("hello 世界")
    assert (
        saved(tmp_path, byte_level()).encode("hello 世界")
        == BYTE_LEVEL.encode("hello 世界")
        != kimi.encode("hello 世界")
    )


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, KIMI], ids=["json", "kimi"])
def test_other_threads_run_while_a_long_text_is_encoded(tokenizer: Tokenizer) -> None:
    done, ticks = threading.Event(), 0

    def encode() -> None:
        tokenizer.encode("one and 2 " * 50_000)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not done.wait(0.001):
        ticks += 1
    thread.join()
    assert ticks > 10  # it takes some tenths of a second; with Python's lock held there are none, or one


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, KIMI], ids=["json", "kimi"])
def test_half_a_surrogate_pair_is_no_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match=r"character 2 is '\\ud83d', an unpaired surrogate"):
        tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, KIMI], ids=["json", "kimi"])
def test_every_token_has_a_name_of_its_own(tokenizer: Tokenizer) -> None:
    """The server's `top_logprobs` are by name: a name for two tokens would lose one."""
    names = list(map(TokenTexts(tokenizer), range(600)))
    assert len(set(names)) == 600
    assert "token_id:599" in names  # no token; and special tokens are written like this, too


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
