"""The files beside tokenizer.json: which of them names a special token, against transformers; and Git LFS pointers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from jax_mla_cp.launch import config_and_tokenizer
from jax_mla_cp.tokenizer import Tokenizer, TokenizerError, require_tokenizer
from jax_mla_cp.tokenizer.tokenizer_config import read_tokenizer_config
from tests.helpers.checkpoints import BASE
from tests.helpers.vocabularies import byte_level, save_json, save_kimi

BOS, EOS = 330, 331
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"
HELLO = [{"role": "user", "content": "hello"}]
DECODER = {"330": {"content": "<s>", "special": True}, "331": {"content": "</s>", "special": True}}


def write(directory: Path, **files: Any) -> None:
    for name, contents in files.items():
        (directory / f"{name}.json").write_text(json.dumps(contents))


def read(directory: Path) -> Tokenizer:
    return require_tokenizer(Tokenizer.from_dir(directory, 1000))


PLACES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str | None]] = {
    "config only": ({"bos_token": "<s>"}, None, "<s>"),
    "map only": ({}, {"bos_token": "<s>"}, "<s>"),
    "map only, as an object": ({}, {"bos_token": {"content": "<s>", "lstrip": False}}, "<s>"),
    "null in the config": ({"bos_token": None}, {"bos_token": "<s>"}, "<s>"),
    "the map goes before an older config": ({"bos_token": "</s>"}, {"bos_token": "<s>"}, "<s>"),
    "a newer config goes before the map": (
        {"bos_token": "</s>", "added_tokens_decoder": DECODER},
        {"bos_token": "<s>"},
        "</s>",
    ),
    "null in a newer config": ({"bos_token": None, "added_tokens_decoder": DECODER}, {"bos_token": "<s>"}, None),
    "neither": ({}, {"eos_token": "</s>"}, None),
}


@pytest.mark.parametrize(("config", "tokens_map", "bos"), PLACES.values(), ids=PLACES.keys())
def test_which_file_names_bos(
    tmp_path: Path, config: dict[str, Any], tokens_map: dict[str, Any] | None, bos: str | None
) -> None:
    from transformers import PreTrainedTokenizerFast

    save_json(tmp_path, byte_level(), chat_template=TEMPLATE, **config)
    if tokens_map is not None:
        write(tmp_path, special_tokens_map=tokens_map)
    tokenizer, theirs = read(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer.special_tokens.get("bos_token") == theirs.bos_token == bos
    first = [] if bos is None else [{"<s>": BOS, "</s>": EOS}[bos]]
    assert tokenizer.encode_chat(HELLO) == first + tokenizer.encode("hello")
    if bos is not None:  # transformers writes "None" for a token that is none
        assert theirs.apply_chat_template(HELLO, tokenize=True, return_dict=False) == tokenizer.encode_chat(HELLO)


def test_a_newer_config_without_a_token_takes_it_from_the_map(tmp_path: Path) -> None:
    """Transformers has no BOS there."""
    save_json(tmp_path, byte_level(), chat_template=TEMPLATE, added_tokens_decoder=DECODER)
    write(tmp_path, special_tokens_map={"bos_token": "<s>"})
    assert read(tmp_path).encode_chat(HELLO)[0] == BOS


def test_add_bos_token_finds_it_in_the_map(tmp_path: Path) -> None:
    save_json(tmp_path, byte_level(), add_bos_token=True)
    write(tmp_path, special_tokens_map={"bos_token": "<s>"})
    assert read(tmp_path).encode("hello")[0] == BOS


def test_kimis_tokens_from_the_map(tmp_path: Path) -> None:
    save_kimi(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    bos = settings.pop("bos_token")
    write(tmp_path, tokenizer_config=settings, special_tokens_map={"bos_token": bos})
    assert read(tmp_path).special_tokens["bos_token"] == bos


def test_without_a_config_the_map_is_read(tmp_path: Path) -> None:
    save_json(tmp_path, byte_level())
    (tmp_path / "tokenizer_config.json").unlink()
    write(tmp_path, special_tokens_map={"eos_token": "</s>"})
    assert read(tmp_path).eos_token_id == EOS


def test_only_tokens_are_taken_from_the_map(tmp_path: Path) -> None:
    write(tmp_path, special_tokens_map={"chat_template": "x", "add_bos_token": True, "bos_token": None})
    assert read_tokenizer_config(tmp_path) == {}


def same_as_transformers(directory: Path, text: str) -> list[int]:
    from transformers import PreTrainedTokenizerFast

    ids = read(directory).encode(text)
    assert ids == PreTrainedTokenizerFast.from_pretrained(directory).encode(text)
    return ids


def without_special_tokens() -> tokenizers.Tokenizer:
    """As `byte_level`, with <s> and </s> in the vocabulary, but not marked as tokens that text becomes."""
    raw = json.loads(byte_level().to_str())
    raw["model"]["vocab"] |= {token["content"]: token["id"] for token in raw["added_tokens"]}
    raw["added_tokens"] = []
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


def test_a_special_token_that_tokenizer_json_does_not_mark(tmp_path: Path) -> None:
    save_json(tmp_path, without_special_tokens(), eos_token="</s>")
    assert BOS not in same_as_transformers(tmp_path, "<s>hello</s>")
    write(tmp_path, special_tokens_map={"bos_token": "<s>"})
    ids = same_as_transformers(tmp_path, "<s>hello</s>")
    assert (ids[0], ids[-1]) == (BOS, EOS)


def test_added_tokens_that_tokenizer_json_lacks(tmp_path: Path) -> None:
    save_json(tmp_path, byte_level())
    assert same_as_transformers(tmp_path, "a<x>") != [*same_as_transformers(tmp_path, "a"), 332]
    write(tmp_path, added_tokens={"<y>": 333, "<x>": 332, "<s>": BOS})
    assert same_as_transformers(tmp_path, "a<x><y>")[-2:] == [332, 333]
    # The newer form goes before the older file.
    write(tmp_path, tokenizer_config={"added_tokens_decoder": DECODER | {"332": {"content": "<z>", "special": True}}})
    assert same_as_transformers(tmp_path, "a<z>")[-1:] == [332]
    assert len(same_as_transformers(tmp_path, "<x>")) == 3


def test_the_end_token_of_the_tokenizer_ends_answers(tmp_path: Path) -> None:
    save_json(tmp_path, byte_level(), eos_token="</s>")
    write(tmp_path, config={"model_type": "deepseek_v3", **BASE}, generation_config={"eos_token_id": [3, 1]})
    assert config_and_tokenizer(tmp_path)[0].eos_token_ids == (1, 3, EOS)
    write(tmp_path, generation_config={"eos_token_id": [EOS, 1]})
    assert config_and_tokenizer(tmp_path)[0].eos_token_ids == (1, EOS)
    write(tmp_path, tokenizer_config={}, generation_config={})
    assert config_and_tokenizer(tmp_path)[0].eos_token_ids == (1,)
    write(tmp_path, special_tokens_map={"eos_token": {"content": "</s>"}})
    assert config_and_tokenizer(tmp_path)[0].eos_token_ids == (1, EOS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert config_and_tokenizer(tmp_path)[0].eos_token_ids == (1,)


def test_a_template_without_its_token_is_no_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_json(tmp_path, byte_level(), chat_template=TEMPLATE)
    read(tmp_path)
    assert "the chat template uses bos_token, which neither" in caplog.text
    caplog.clear()
    write(tmp_path, special_tokens_map={"bos_token": "<s>"})
    read(tmp_path)
    assert not caplog.text
    write(tmp_path, special_tokens_map={"bos_token": "<none>"})
    with pytest.raises(TokenizerError, match=r"uses bos_token='<none>' .*which is not a token of the tokenizer"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"special_tokens_map": ["<s>"]}, "special_tokens_map.json: expected a JSON object, got list"),
        ({"special_tokens_map": {"bos_token": 5}}, "bos_token: expected a string or an object with content, got 5"),
        ({"special_tokens_map": {"bos_token": {"id": 5}}}, "bos_token: expected a string or an object"),
        ({"special_tokens_map": {"additional_special_tokens": "<s>"}}, "additional_special_tokens: expected a list"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": "<s>"}}}, "expected ids, each with the token's text"),
        ({"tokenizer_config": {"added_tokens_decoder": ["<s>"]}}, "added_tokens_decoder: expected an object"),
        ({"tokenizer_config": {"added_tokens_decoder": {"400": "<x>"}}}, "'<x>' has id 400 there, and 332 by"),
        ({"added_tokens": {"<x>": "332"}}, "added_tokens.json: '<x>': expected a token id, got '332'"),
        ({"added_tokens": {"<x>": 400}}, "'<x>' has id 400 there, and 332 by tokenizer.json"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    save_json(tmp_path, byte_level())
    write(tmp_path, **files)
    with pytest.raises(TokenizerError, match=message):
        read(tmp_path)


FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]


@pytest.mark.parametrize("name", [*FILES, "tiktoken.model"])
def test_git_lfs_pointers_are_called_that(tmp_path: Path, name: str) -> None:
    if name == "tiktoken.model":
        save_kimi(tmp_path)
    else:
        save_json(tmp_path, byte_level())
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
    with pytest.raises(TokenizerError, match=rf"{name}: a Git LFS pointer, .* Run `git lfs pull` in {tmp_path}\."):
        read(tmp_path)
