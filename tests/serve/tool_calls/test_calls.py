"""Texts with calls, in every format: whole and by characters."""

from __future__ import annotations

import json

import pytest

from jax_mla_cp.serve.tool_calls import FORMATS
from tests.serve.tool_calls.formats import BEGIN, CALL_END, END, NAMES, TOOLS, call, head, read, read_both, section

ARGUMENTS = '{"city": "Łódź \\"x\\"", "days": 3, "hours": [1, {"a": null}]}'
every_format = pytest.mark.parametrize("name", NAMES)


@every_format
def test_one_call(name: str) -> None:
    found = read_both(name, section(name, ("get_weather", ARGUMENTS)))
    assert (found.content, found.calls, found.is_incomplete) == ("", [("get_weather", ARGUMENTS)], False)


@every_format
def test_several_calls(name: str) -> None:
    calls = [("get_weather", ARGUMENTS), ("now", "{}"), ("get_weather", '{"city": ""}')]
    found = read_both(name, section(name, *calls))
    assert found.content == "" and found.calls == calls and not found.is_incomplete


@every_format
def test_content_before_and_after(name: str) -> None:
    """Content is verbatim; a client gets text behind the calls too."""
    found = read_both(name, "\nLet me see.\n" + section(name, ("now", "{}")) + "\n\nDone.\n")
    assert found.content == "\nLet me see.\n\n\nDone.\n" and found.calls == [("now", "{}")]


@every_format
def test_white_space_beside_calls_is_no_content(name: str) -> None:
    text = section(name, ("now", "{}"))
    assert read_both(name, f" \n{text}\n\n{text}\n ").content == ""
    assert read_both(name, " \n ").content == " \n ", "without calls it is the content"


@every_format
def test_two_sections(name: str) -> None:
    text = section(name, ("now", "{}"))
    found = read_both(name, f"{text} and {text}")
    assert found.content == " and " and found.calls == [("now", "{}")] * 2


@every_format
def test_a_function_that_is_no_tool(name: str) -> None:
    """As in vLLM: the client can answer with an error, which the model understands."""
    assert read_both(name, section(name, ("rm", '{"path": "x"}'))).calls == [("rm", '{"path": "x"}')]


@every_format
def test_empty_arguments(name: str) -> None:
    """As vLLM's parsers of Kimi and GLM have it: clients parse the arguments as JSON."""
    assert read_both(name, section(name, ("now", ""))).calls == [("now", "{}")]


@every_format
def test_an_empty_section(name: str) -> None:
    if not BEGIN[name]:
        assert read_both(name, "<tool_call></tool_call>").content == "<tool_call></tool_call>"
        return
    for gap in ("", "\n "):
        found = read_both(name, f"Well{BEGIN[name]}{gap}{END[name]}")
        assert (found.content, found.calls, found.is_incomplete) == ("Well", [], False)


@every_format
def test_markers_inside_of_a_string(name: str) -> None:
    inner = section(name, ("now", "{}")).replace("</arg_value>", "")
    arguments = json.dumps({"city": f'a"{inner}\\'}, ensure_ascii=False)
    found = read_both(name, section(name, ("get_weather", arguments), ("now", "{}")))
    assert found.calls == [("get_weather", arguments), ("now", "{}")] and found.content == ""


@every_format
def test_white_space_around_markers(name: str) -> None:
    text = section(name, ("get_weather", '{"city": "x"}'), ("now", "{}"))
    for marker in sorted({*FORMATS[name].markers} - {"</arg_value>", "<arg_value>"}):
        text = text.replace(marker, f"\n {marker} \n")
    found = read_both(name, text)
    assert found.calls == [("get_weather", '{"city": "x"}'), ("now", "{}")] and found.content == ""


@every_format
def test_calls_that_the_end_of_the_text_cuts(name: str) -> None:
    """Whatever is cut: arguments are a beginning of the whole ones, and the call counts as incomplete."""
    text = section(name, ("get_weather", ARGUMENTS))
    start = text.index("get_weather") + len("get_weather")
    outcomes = set()
    for end in range(start, len(text)):
        found = read(name, [text[:end]])
        if not found.calls:
            assert found.content == text[:end] and not found.is_incomplete, "not a call yet"
            continue
        assert found.content in ("", text[end - len(found.content) : end])
        arguments = found.calls[0][1]
        assert ARGUMENTS.startswith(arguments)
        if arguments != ARGUMENTS:
            assert found.is_incomplete
        outcomes.add(arguments)
    assert len(outcomes) > 20 and (name == "glm47" or ARGUMENTS in outcomes)


@every_format
def test_streamed_arguments_come_at_once(name: str) -> None:
    """No piece of a string is held back, except for the beginning of a marker."""
    parser = FORMATS[name].new_parser(TOOLS)
    opening = '{"city": "' if name != "glm47" else "<arg_key>city</arg_key><arg_value>"
    parser.push(BEGIN[name] + head(name, "get_weather") + opening + "x")
    for piece in ("Lon", "don", "\n" if name == "glm47" else "\\n", "!"):
        (delta,) = parser.push(piece).calls
        assert delta.arguments == piece.replace("\n", "\\n")


@every_format
def test_ids(name: str) -> None:
    found = read(name, [section(name, ("now", "{}"), ("now", "{}"))])
    assert len(set(found.ids)) == 2
    if name == "kimi_k2":
        assert found.ids == ["functions.now:0", "functions.now:1"]
        assert FORMATS[name].call_id("now", 7) == "functions.now:7"
    else:
        assert all(one.startswith("call_") and len(one) == 29 for one in found.ids)


def test_kimi_counts_over_the_conversation() -> None:
    text = call("kimi_k2", "now", "{}", number=12)
    assert read("kimi_k2", [BEGIN["kimi_k2"] + text + END["kimi_k2"]]).ids == ["functions.now:12"]
    without = text.replace("functions.", "")
    assert read("kimi_k2", [without]).ids == ["functions.now:12"], "K2 may forget the prefix"


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v31", "kimi_k2"])
def test_markers_that_models_forget(name: str) -> None:
    whole = section(name, ("get_weather", ARGUMENTS), ("now", "{}"))
    assert read_both(name, whole.removeprefix(BEGIN[name])).calls == read(name, [whole]).calls
    end = CALL_END[name].lstrip("\n`")
    found = read_both(name, f"{BEGIN[name]}{head(name, 'now')}{{}}{END[name]} x")
    assert found.calls == [("now", "{}")] and found.content == " x" and not found.is_incomplete
    # The end of the text stands for the end marker where the arguments are complete.
    assert not read_both(name, whole.removesuffix(end + END[name])).is_incomplete
    assert read_both(name, whole.removesuffix("}" + CALL_END[name] + END[name])).is_incomplete
    bare = f"{BEGIN[name]}{head(name, 'now')}{{}}{end}{END[name]}"
    assert read_both(name, bare).calls == [("now", "{}")], "without the fence"


def test_a_fence_inside_of_a_string_is_not_the_end() -> None:
    arguments = '{"city": "```\\n```<｜tool▁call▁end｜>"}'
    assert read_both("deepseek_v3", section("deepseek_v3", ("get_weather", arguments))).calls[0][1] == arguments


@every_format
def test_arguments_are_verbatim(name: str) -> None:
    if name == "glm47":
        return
    arguments = '{ "b" :1.0e5,\n\t"a": "\\u00e9\\/<b>" ,"c": [ ] , bad `x` < }'
    assert read_both(name, section(name, ("now", f"\n {arguments} \n"))).calls == [("now", arguments)]
