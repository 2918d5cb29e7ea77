"""Kimi's tokenizer against tiktoken's own slow implementation, and against expectations written by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken._educational import SimpleBytePairEncoding

from jax_mla_cp.tokenizer import Tokenizer, TokenizerError, kimi, require_tokenizer
from tests.helpers.vocabularies import CORPUS, KIMI, KIMI_SPECIALS, kimi_ranks, save_kimi

FIRST_SPECIAL = len(kimi_ranks())
# In Python, with another library for regular expressions: nothing of tiktoken's Rust.
SLOW = SimpleBytePairEncoding(pat_str="(?V1)" + kimi.PATTERN, mergeable_ranks=kimi_ranks())

SAMPLES = [
    *CORPUS[:4],
    "",
    " ",
    "a",
    "  two  spaces  ",
    "tabs\tand\r\nlines\n\n\n  end ",
    "def f(x):\n\treturn x[0] + 1  # ok\n",
    "XMLHttpRequest iPhone HELLO World",
    "don't DON'T we'LL they've x's",
    "1 12 123 1234 12345678",
    "١٢٣٤ ⅧⅨ ²³",
    "中文English混合text",
    "中文、标点。「引用」",
    "日本語のテキスト",
    "한국어 텍스트",
    "e\u0301cole",
    "ǅ ª ŉ ß İ",
    "👩‍👩‍👧👨🏽‍💻🇩🇪",
    "¡¿!?...",
    "\u00a0nbsp\u3000ideographic\u2028line",
    "a" * 1000,
    " " * 1000,
    "\n" * 300,
    "中" * 500,
    "ab" * 700,
]


@pytest.mark.parametrize("text", SAMPLES)
def test_same_ids_as_the_slow_implementation(text: str) -> None:
    ids = KIMI.encode(text)
    assert ids == SLOW.encode(text, visualise=None)
    assert KIMI.decode(ids) == text


ASSIGNED = st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs", "Cn", "Co"])


@settings(max_examples=300, deadline=None)
@given(st.lists(ASSIGNED | st.sampled_from([*"aZ9 \n\t'中に한!", "\r\n", "'ll", "😀"]), max_size=40).map("".join))
def test_any_text_has_the_same_ids(text: str) -> None:
    ids = KIMI.encode(text)
    assert ids == SLOW.encode(text, visualise=None)
    assert KIMI.decode(ids) == text


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("XMLHttpRequest's", ["XMLHttp", "Request's"]),  # camelCase's parts; an apostrophe's ending belongs to its word
        ("HELLO World", ["HELLO", " World"]),
        ("中文English混合", ["中文", "English", "混合"]),  # Chinese is apart,
        ("日本語の", ["日本語", "の"]),  # and only that
        ("x=12345;\n\n", ["x", "=", "123", "45", ";\n\n"]),
        ("a  b", ["a", " ", " b"]),
        ("a \n b", ["a", " \n", " b"]),
        ("f(x) ", ["f", "(x", ")", " "]),  # one character before a word belongs to it
    ],
)
def test_how_text_is_divided(text: str, pieces: list[str]) -> None:
    assert regex.findall("(?V1)" + kimi.PATTERN, text) == pieces


def test_special_tokens_are_their_ids_wherever_they_stand() -> None:
    bare = KIMI.encode("hello")
    for place, name in KIMI_SPECIALS.items():
        assert KIMI.encode(f"hello{name}hello") == [*bare, FIRST_SPECIAL + place, *bare]
    assert KIMI.encode(f"<|reserved_token_{FIRST_SPECIAL + 20}|>") == [FIRST_SPECIAL + 20]  # those without a name, too
    almost = "<|im_end|"
    assert KIMI.encode(almost) == SLOW.encode(almost, visualise=None)


def test_of_two_names_the_longer_one_is_meant(tmp_path: Path) -> None:
    names = {str(FIRST_SPECIAL): "<|a|>", str(FIRST_SPECIAL + 1): "<|a|>b"}
    save_kimi(tmp_path, added_tokens_decoder={key: {"content": name} for key, name in names.items()})
    tokenizer = require_tokenizer(Tokenizer.from_dir(tmp_path, 1000))
    assert tokenizer.encode("<|a|>b<|a|>") == [FIRST_SPECIAL + 1, FIRST_SPECIAL]


def test_special_tokens_are_no_text_but_tool_calls_are() -> None:
    ids = KIMI.encode("<|im_assistant|>hello<|tool_calls_section_begin|>[EOT]<|im_end|>")
    assert KIMI.decode(ids) == "hello<|tool_calls_section_begin|>"


def test_bytes_that_are_no_text() -> None:
    raw = b"a\xff\xe4\xbd b"
    ids = [kimi_ranks()[bytes([byte])] for byte in raw]
    assert KIMI.decode(ids) == raw.decode("utf-8", "replace")
    assert KIMI.decode([FIRST_SPECIAL + 256, 10**9]) == ""


def test_white_space_is_what_python_says() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    runs = [run.group() for run in kimi._RUN.finditer(every)]
    assert "".join(run for run in runs if run[0].isspace()) == "".join(filter(str.isspace, every))


def cut_by_character(text: str, longest: int, chars: int) -> Iterator[str]:
    """The rule as a loop over characters: a piece ends before the character that makes a run too long."""
    for start in range(0, len(text), chars):
        piece, run = "", 0
        for i, char in enumerate(text[start : start + chars]):
            run = run + 1 if i and char.isspace() == text[start + i - 1].isspace() else 1
            if run > longest:
                yield piece
                piece, run = "", 1
            piece += char
        yield piece


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab \n中", max_size=90))
def test_where_long_text_is_cut(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kimi, "_MAX_CHARS", 40)
        patch.setattr(kimi, "_MAX_RUN", 7)
        assert list(kimi._split_long(text)) == list(cut_by_character(text, 7, 40))


@pytest.mark.parametrize("unit", [" ", "a", "中", "aA"])
def test_very_long_runs(unit: str) -> None:
    """Without the cuts a million spaces are a panic in tiktoken."""
    text = unit * (1_000_000 // len(unit))
    assert KIMI.decode(KIMI.encode(text)) == text


def test_bos_and_eos_by_flag(tmp_path: Path) -> None:
    save_kimi(tmp_path, add_bos_token=True, add_eos_token=True)
    tokenizer = require_tokenizer(Tokenizer.from_dir(tmp_path, 1000))
    assert tokenizer.encode("hello") == [FIRST_SPECIAL, *KIMI.encode("hello"), FIRST_SPECIAL + 1]


def test_token_beyond_the_models_vocabulary(tmp_path: Path) -> None:
    save_kimi(tmp_path)
    assert Tokenizer.from_dir(tmp_path, FIRST_SPECIAL + 256) is not None  # as Kimi-K2's: 163584 + 256 = 163840
    with pytest.raises(TokenizerError, match=r"token '\[PAD\]' has id 585, but the model's vocab_size is 585"):
        Tokenizer.from_dir(tmp_path, FIRST_SPECIAL + 255)


def drop(rank: int) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: lines[:rank] + lines[rank + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:5], b"!!!! 5", *lines[6:]], "line 6 is not a token in base64"),
        (lambda lines: [*lines[:5], lines[5].split()[0], *lines[6:]], "line 6 is not a token in base64"),
        (lambda lines: [*lines[:5], lines[5] + b" 7", *lines[6:]], "line 6 is not a token in base64"),
        (lambda lines: [*lines, lines[3]], "line 331: the token .* is empty or a duplicate"),
        (lambda lines: [*lines, b" 330"], "line 331: the token b'' is empty or a duplicate"),
        (lambda lines: [*lines[:-1], lines[-1].split()[0] + b" 3"], "ranks of 330 tokens must be 0 to 329"),
        (drop(300), "ranks of 329 tokens must be 0 to 328"),
        (lambda lines: lines[:200], "no token for the single byte"),
        (lambda lines: [], "no token for the single byte 0x00"),
    ],
)
def test_damaged_tiktoken_model(tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], message: str) -> None:
    save_kimi(tmp_path)
    path = tmp_path / "tiktoken.model"
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())))
    with pytest.raises(TokenizerError, match=f"tiktoken.model: .*{message}"):
        Tokenizer.from_dir(tmp_path, 1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, "tokenizer_class='PreTrainedTokenizerFast'"),
        ({"added_tokens_decoder": {"5": {"content": "<x>"}}}, "'5' is '<x>'; expected ids from 330"),
        ({"added_tokens_decoder": {"586": {"content": "<x>"}}}, "'586' is '<x>'; expected ids from 330 .* to 585"),
        ({"added_tokens_decoder": {"x": {"content": "<x>"}}}, "'x' is '<x>'"),
        ({"added_tokens_decoder": {"330": {}}}, "'330' is None"),
        ({"added_tokens_decoder": {"330": {"content": "<x>"}, "331": {"content": "<x>"}}}, "'<x>' has two ids"),
        ({"added_tokens_decoder": {"330": {"content": "<x>", "lstrip": True}}}, "'<x>' has lstrip"),
        ({"added_tokens_decoder": ["<x>"]}, "added_tokens_decoder: expected an object"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    save_kimi(tmp_path, **settings)
    with pytest.raises(TokenizerError, match=f"tokenizer_config.json: .*{message}"):
        Tokenizer.from_dir(tmp_path, 1000)


def test_without_settings(tmp_path: Path) -> None:
    save_kimi(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="tokenizer_class=None"):
        Tokenizer.from_dir(tmp_path, 1000)
