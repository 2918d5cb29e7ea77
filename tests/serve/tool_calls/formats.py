"""Each format as the models' chat templates write it, and what a parser reads from pieces of a text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jax_mla_cp.serve.tool_calls import FORMATS

Call = tuple[str, str]
"""The name and the arguments' JSON text."""

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "hours": {"type": "array"}},
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]

BEGIN = {
    "deepseek_v3": "<｜tool▁calls▁begin｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜>",
    "kimi_k2": "<|tool_calls_section_begin|>",
    "glm47": "",
}
END = {
    "deepseek_v3": "<｜tool▁calls▁end｜>",
    "deepseek_v31": "<｜tool▁calls▁end｜>",
    "kimi_k2": "<|tool_calls_section_end|>",
    "glm47": "",
}
CALL_END = {
    "deepseek_v3": "\n```<｜tool▁call▁end｜>",
    "deepseek_v31": "<｜tool▁call▁end｜>",
    "kimi_k2": "<|tool_call_end|>",
    "glm47": "</tool_call>",
}
NAMES = sorted(FORMATS)


def head(name: str, function: str, number: int = 0) -> str:
    """A call up to its arguments."""
    return {
        "deepseek_v3": f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{function}\n```json\n",
        "deepseek_v31": f"<｜tool▁call▁begin｜>{function}<｜tool▁sep｜>",
        "kimi_k2": f"<|tool_call_begin|>functions.{function}:{number}<|tool_call_argument_begin|>",
        "glm47": f"<tool_call>{function}",
    }[name]


def tagged(arguments: Mapping[str, Any]) -> str:
    """Arguments in GLM's tags."""
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in arguments.items()}
    return "".join(f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in values.items())


def call(name: str, function: str, arguments: str, number: int = 0) -> str:
    written = tagged(json.loads(arguments or "{}")) if name == "glm47" else arguments
    return head(name, function, number) + written + CALL_END[name]


def section(name: str, *calls: Call) -> str:
    between = "\n" if name == "deepseek_v3" else ""
    return BEGIN[name] + between.join(call(name, *one, i) for i, one in enumerate(calls)) + END[name]


@dataclasses.dataclass
class Reading:
    content: str = ""
    calls: list[Call] = dataclasses.field(default_factory=list)
    ids: list[str] = dataclasses.field(default_factory=list)
    is_incomplete: bool = False


def read(name: str, pieces: Iterable[str], tools: Sequence[Mapping[str, Any]] = TOOLS) -> Reading:
    """Reads a text in pieces, as a client joins the deltas."""
    parser = FORMATS[name].new_parser(tools)
    found = Reading()
    for parsed in [*(parser.push(piece) for piece in pieces), parser.finish()]:
        found.content += parsed.content
        for delta in parsed.calls:
            if delta.id is not None:
                assert delta.index == len(found.calls) and delta.name and not delta.arguments
                found.calls.append((delta.name, ""))
                found.ids.append(delta.id)
            else:
                assert delta.index == len(found.calls) - 1 and delta.name is None and delta.arguments
                function, arguments = found.calls[-1]
                found.calls[-1] = function, arguments + delta.arguments
    found.is_incomplete = parser.is_incomplete
    return found


def read_both(name: str, text: str) -> Reading:
    """Reads a text whole and by characters, which has to be the same."""
    whole, streamed = read(name, [text]), read(name, text)
    assert (streamed.content, streamed.calls, streamed.is_incomplete) == (
        whole.content,
        whole.calls,
        whole.is_incomplete,
    )
    return whole
