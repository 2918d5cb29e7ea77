"""Texts that only look like calls stay content."""

from __future__ import annotations

import pytest

from jax_mla_cp.serve.tool_calls import FORMATS
from jax_mla_cp.serve.tool_calls.pattern import MAX_LENGTH
from tests.serve.tool_calls.formats import BEGIN, CALL_END, END, NAMES, call, head, read_both, section

every_format = pytest.mark.parametrize("name", NAMES)


def stays_text(name: str, text: str) -> None:
    found = read_both(name, text)
    assert (found.content, found.calls, found.is_incomplete) == (text, [], False)


@every_format
def test_a_marker_in_a_sentence(name: str) -> None:
    for marker in FORMATS[name].markers:
        stays_text(name, f"The marker {marker} begins or ends something.")
        stays_text(name, marker)
        stays_text(name, marker + "\n")
        stays_text(name, f"{marker[:-1]} {marker[1:]} <{marker}"[:-1])


@every_format
def test_a_call_without_a_name(name: str) -> None:
    stays_text(name, BEGIN[name] + head(name, "") + "{}" + CALL_END[name] + END[name])
    stays_text(name, BEGIN[name] + head(name, "two words") + "{}" + CALL_END[name] + END[name])


@every_format
def test_an_unknown_spelling(name: str) -> None:
    text = section(name, ("now", "{}"))
    for wrong in (text.upper(), text.replace("tool", "toal"), text.replace("<", "< "), text.replace("call", "calls")):
        assert wrong != text
        stays_text(name, wrong)


@every_format
def test_other_formats(name: str) -> None:
    for other in NAMES:
        if {other, name} not in ({name}, {"deepseek_v3", "deepseek_v31"}):
            stays_text(name, section(other, ("now", '{"a": 1}')))


def test_the_fence_tells_deepseeks_formats_apart() -> None:
    stays_text("deepseek_v3", section("deepseek_v31", ("now", "{}")))
    stays_text("deepseek_v3", section("deepseek_v3", ("now", "{}")).replace("function", "tool"))


def test_kimi_needs_a_number() -> None:
    stays_text("kimi_k2", section("kimi_k2", ("now", "{}")).replace(":0", ""))
    stays_text("kimi_k2", section("kimi_k2", ("now", "{}")).replace(":0", ":x"))


@every_format
def test_a_call_behind_one_that_is_none(name: str) -> None:
    """The search goes on inside of the text that was none."""
    wrong = (BEGIN[name] or "<tool_call>") + " is how it begins: "
    found = read_both(name, wrong + section(name, ("now", "{}")))
    assert found.content == wrong and found.calls == [("now", "{}")]


@every_format
def test_text_within_a_section(name: str) -> None:
    text = f"{BEGIN[name]}{call(name, 'now', '{}')} then {call(name, 'now', '{}', 1)}{END[name]} bye"
    found = read_both(name, text)
    assert found.content == " then  bye" and found.calls == [("now", "{}")] * 2


@every_format
def test_nothing_is_held_back_for_long(name: str) -> None:
    """White space between the parts of a call is bounded, so that a stream goes on; whatever its cuts."""
    first = FORMATS[name].section_start[0]
    parser = FORMATS[name].new_parser([])
    shown = parser.push(first).content
    for _ in range(MAX_LENGTH):
        shown += parser.push(" ").content
    assert first in shown and len(first) <= len(shown)
    for count in (MAX_LENGTH - 100, MAX_LENGTH - 60, MAX_LENGTH - 30, MAX_LENGTH):
        read_both(name, first + " " * count + section(name, ("now", "{}")).removeprefix(first))


@every_format
def test_html_is_content(name: str) -> None:
    stays_text(name, "<div><tool></tool><｜x｜><|x|> a < b <</div> `x` ```json\n{}\n```")
