"""From a chat model's text to reasoning, content and tool calls."""

from __future__ import annotations

import dataclasses

from jax_mla_cp.serve.reasoning import ReasoningParser
from jax_mla_cp.serve.tool_calls import CallDelta, ToolCallParser


@dataclasses.dataclass(frozen=True)
class ParsedText:
    """Parts of the text that are certain by now; each may be empty."""

    reasoning: str
    content: str
    calls: list[CallDelta]


class OutputParser:
    """Splits the streamed text of one choice, first into reasoning and the rest, then the rest into content and calls.

    Args:
      reasoning: None: the text has no reasoning.
      calls: None: calls are not looked for.
      parallel: False: only the first call counts.
    """

    def __init__(self, reasoning: ReasoningParser | None, calls: ToolCallParser | None, *, parallel: bool = True):
        self._reasoning = reasoning
        self._calls = calls
        self._parallel = parallel
        self._last_call = -1
        """Index of the call that has come last, counted or not."""

    @property
    def has_calls(self) -> bool:
        return self._last_call >= 0

    @property
    def is_cut_off(self) -> bool:
        """True if the text ended within a call that counts."""
        return self._calls is not None and self._calls.is_incomplete and self._counts(self._last_call)

    def push(self, text: str) -> ParsedText:
        reasoning, content = ("", text) if self._reasoning is None else self._reasoning.push(text)
        return self._split(reasoning, content)

    def finish(self, text: str) -> ParsedText:
        """Adds the last text and ends the output."""
        parts = [self.push(text)]
        if self._reasoning is not None:
            parts.append(self._split(*self._reasoning.flush()))
        if self._calls is not None:
            last = self._calls.finish()
            parts.append(ParsedText("", last.content, self._counted(last.calls)))
        return ParsedText(
            "".join(part.reasoning for part in parts),
            "".join(part.content for part in parts),
            [call for part in parts for call in part.calls],
        )

    def _split(self, reasoning: str, content: str) -> ParsedText:
        if self._calls is None or not content:
            return ParsedText(reasoning, content, [])
        parsed = self._calls.push(content)
        return ParsedText(reasoning, parsed.content, self._counted(parsed.calls))

    def _counted(self, calls: list[CallDelta]) -> list[CallDelta]:
        if calls:
            self._last_call = calls[-1].index
        return [call for call in calls if self._counts(call.index)]

    def _counts(self, index: int) -> bool:
        return self._parallel or index == 0
