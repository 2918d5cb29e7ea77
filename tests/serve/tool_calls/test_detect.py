"""The format is chosen from the chat template's text."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_mla_cp.serve.tool_calls import FORMATS, detect
from tests.serve.tool_calls.formats import NAMES, read, section

TEMPLATES = Path(__file__).parents[2] / "tokenizer" / "templates"


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("deepseek_v3", "deepseek_v3"),
        ("deepseek_r1", "deepseek_v3"),
        ("kimi_k2", "kimi_k2"),
        ("kimi_k2_thinking", "kimi_k2"),
    ],
)
def test_templates_of_models(file: str, name: str) -> None:
    found = detect((TEMPLATES / f"{file}.jinja").read_text())
    assert found is not None and found.name == name


@pytest.mark.parametrize("name", NAMES)
def test_what_a_template_writes_tells_the_format(name: str) -> None:
    text = "{% for call in message.tool_calls %}" + section(name, ("now", '{"a": 1}')) + "{% endfor %}"
    found = detect(text)
    assert found is FORMATS[name] and found.name == name
    assert set(found.section_start) <= set(found.markers)
    assert all(marker in text for marker in found.markers), "no marker is forgotten"
    assert read(found.name, [section(name, ("now", '{"a": 1}'))]).calls


@pytest.mark.parametrize(
    "template",
    [
        "",
        "{{ messages[0].content }}",
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        "<｜tool▁outputs▁begin｜>",
        "<|tool_call>call:f{}<tool_call|>",
        "```json",
    ],
)
def test_other_templates(template: str) -> None:
    assert detect(template) is None
