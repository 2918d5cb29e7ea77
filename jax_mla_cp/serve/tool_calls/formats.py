"""The known formats: `FORMATS` by name, `detect` by chat template.

Read from the models' chat templates and from vLLM's (tool_parsers/deepseekv3, deepseekv31; parser/kimi_k2, glm47_moe) and
SGLang's (function_call/) parsers.
"""

from __future__ import annotations

from jax_mla_cp.serve.tool_calls.json_format import JsonFormat
from jax_mla_cp.serve.tool_calls.tagged_arguments import CALL_END, KEY, KEY_END, VALUE, VALUE_END
from jax_mla_cp.serve.tool_calls.tagged_format import CALL, TaggedFormat
from jax_mla_cp.serve.tool_calls.tool_format import ToolFormat

_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_DEEPSEEK_SEPARATOR = "<｜tool▁sep｜>"
_KIMI_SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI_CALL = ("<|tool_call_begin|>", "<|tool_call_end|>")
_KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
_FENCE = "```json"

_DEEPSEEK_V3 = JsonFormat(
    name="deepseek_v3",
    markers=(*_DEEPSEEK_SECTION, *_DEEPSEEK_CALL, _DEEPSEEK_SEPARATOR),
    section_start=_DEEPSEEK_SECTION[:1],
    section=_DEEPSEEK_SECTION,
    call=_DEEPSEEK_CALL,
    before_name=("function", _DEEPSEEK_SEPARATOR),
    after_name=(f"\n{_FENCE}\n",),
    before_end=("\n```",),
    between="\n",
)
"""DeepSeek-V3 and R1."""

_DEEPSEEK_V31 = JsonFormat(
    name="deepseek_v31",
    markers=_DEEPSEEK_V3.markers,
    section_start=_DEEPSEEK_V3.section_start,
    section=_DEEPSEEK_SECTION,
    call=_DEEPSEEK_CALL,
    after_name=(_DEEPSEEK_SEPARATOR,),
)
"""DeepSeek-V3.1 and V3.1-Terminus."""

_KIMI_K2 = JsonFormat(
    name="kimi_k2",
    markers=(*_KIMI_SECTION, *_KIMI_CALL, _KIMI_ARGUMENTS),
    section_start=_KIMI_SECTION[:1],
    section=_KIMI_SECTION,
    call=_KIMI_CALL,
    after_name=(_KIMI_ARGUMENTS,),
    is_numbered=True,
)
"""Kimi K2 to K2.7."""

_GLM47 = TaggedFormat(
    name="glm47",
    markers=(CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END),
    section_start=(CALL,),
)
"""GLM-4.5 to 4.7; 4.5 writes a line for each tag."""

FORMATS: dict[str, ToolFormat] = {one.name: one for one in (_DEEPSEEK_V3, _DEEPSEEK_V31, _KIMI_K2, _GLM47)}


def detect(template_source: str) -> ToolFormat | None:
    """The format in which a chat template writes the calls of earlier turns; None: no known one."""
    if _KIMI_ARGUMENTS in template_source:
        return _KIMI_K2
    if KEY in template_source:
        return _GLM47
    if _DEEPSEEK_CALL[0] in template_source and _DEEPSEEK_SEPARATOR in template_source:
        return _DEEPSEEK_V3 if _FENCE in template_source else _DEEPSEEK_V31
    return None
