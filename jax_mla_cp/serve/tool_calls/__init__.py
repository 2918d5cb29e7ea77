"""Tool-call formats: how each model family writes calls in its text, parsed as the text comes and held by grammars.

A `ToolFormat` is found by name (`FORMATS`) or in a chat template (`detect`). Its `ToolCallParser` divides a streamed text into
content and calls; its `grammar` makes the model call. Nothing here knows of HTTP or of tokens: text in, `Parsed` out.
"""

from __future__ import annotations

from jax_mla_cp.serve.tool_calls.call_rules import CallRules
from jax_mla_cp.serve.tool_calls.formats import FORMATS, detect
from jax_mla_cp.serve.tool_calls.functions import SchemaError
from jax_mla_cp.serve.tool_calls.parsed import CallDelta, Parsed
from jax_mla_cp.serve.tool_calls.parser import ToolCallParser
from jax_mla_cp.serve.tool_calls.tool_format import ToolFormat

__all__ = ["FORMATS", "CallDelta", "CallRules", "Parsed", "SchemaError", "ToolCallParser", "ToolFormat", "detect"]
