"""Chat templates: from the messages of a conversation to the text of a prompt."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_mla_cp.tokenizer.errors import TokenizerError
from jax_mla_cp.tokenizer.messages import plain_messages
from jax_mla_cp.tokenizer.sandbox import SandboxedTemplate
from jax_mla_cp.tokenizer.tokenizer_config import read_text, special_tokens

_END_MARK = "END_OF_THE_FINAL_MESSAGE "
"""Follows the content of a message that is to be continued; white space at its end tells if the template trims."""
_PROBE = '{"probe_key": "probe_value"}'


class ChatTemplate:
    """A Jinja template that turns messages into a prompt, rendered as by transformers' `apply_chat_template`.

    >>> source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    >>> ChatTemplate(source, {"bos_token": "<s>"}).render([{"role": "user", "content": "Hello"}])
    '<s>[user] Hello'
    """

    def __init__(self, source: str, tokenizer_config: Mapping[str, Any], *, name: str = "chat_template"):
        """
        Args:
          tokenizer_config: the contents of tokenizer_config.json, for `bos_token` and the other special tokens.
          name: the template's name in error messages.

        Raises:
          TokenizerError: it is not valid Jinja, or too long.
        """
        self.source = source
        self._template = SandboxedTemplate(source, name)
        self._special_tokens = special_tokens(tokenizer_config)

    @classmethod
    def from_dir(cls, directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
        """Reads chat_template.jinja, or else the template in tokenizer_config.json; None if there is neither."""
        path = directory / "chat_template.jinja"
        if path.is_file():
            return cls(read_text(path), tokenizer_config, name=str(path))
        return cls.from_config(tokenizer_config)

    @classmethod
    def from_config(cls, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
        """Takes `chat_template`, a string or a list of named templates with a "default"; None if there is none.

        Raises:
          TokenizerError: it is neither, there is no "default", or as for the constructor.
        """
        name = "tokenizer_config.json: chat_template"
        source = tokenizer_config.get("chat_template")
        if isinstance(source, list):
            by_name = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            name, source = f"{name} 'default'", by_name.get("default")
            if source is None:
                raise TokenizerError(name, f"not found; the templates are {sorted(map(str, by_name))}.")
        if source is None:
            return None
        if not isinstance(source, str):
            raise TokenizerError(name, f"expected a string, got {type(source).__name__}.")
        return cls(source, tokenizer_config, name=name)

    @property
    def variables(self) -> frozenset[str]:
        """The names of the variables that the template reads."""
        return self._template.variables

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """Renders the text of a conversation.

        Args:
          messages: each has `role`, one of `messages.ROLES`, and `content`, a string or a list of
            `{"type": "text", "text": ...}`, which are concatenated. An assistant's may have `reasoning_content` and
            `tool_calls`, in OpenAI's form, a tool's `tool_call_id`, each `name`. The template decides whether roles must
            alternate.
          tools: functions in OpenAI's form.
          add_generation_prompt: end with the beginning of an assistant message.
          continue_final_message: end within the last message, an assistant's, right after its content, as transformers does.
          variables: further variables of the template, for example DeepSeek-V3.1's `thinking`; JSON values.

        Raises:
          ValueError: a message or variable does not have this form, or the template has no place for tools, for a message's
            role or for its calls.
          TokenizerError: the template refuses the messages, fails, or exceeds a limit of `sandbox`.
        """
        try:
            # Templates must not reach the methods of other objects.
            json_values = json.loads(json.dumps({**variables, "tools": list(tools) if tools else None}))
        except (TypeError, ValueError) as error:
            raise ValueError(f"variables for the chat template: expected JSON values: {error}") from error
        plain = plain_messages(messages, parse_arguments=self._reads_arguments_as_objects(messages))
        self._check_places(plain, bool(tools))
        if not continue_final_message:
            return self._render(plain, add_generation_prompt, json_values)
        if plain[-1]["role"] != "assistant" or "tool_calls" in plain[-1]:
            raise ValueError("continue_final_message: the last message must be an assistant's, without tool calls.")
        plain[-1]["content"] += _END_MARK
        return _before_mark(self._render(plain, False, json_values))

    def _render(self, plain: list[dict[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
        return self._template.render(
            {"tools": None, "documents": None}  # defined, as in transformers
            | self._special_tokens
            | dict(variables)
            | {"messages": plain, "add_generation_prompt": add_generation_prompt}
        )

    def _check_places(self, plain: list[dict[str, Any]], has_tools: bool) -> None:
        """Refuses what the template would drop in silence; turns developers into systems where it knows no developer."""
        if has_tools and "tools" not in self.variables:
            raise ValueError(
                "tools: this model's chat template has no place for tools. Put one that has into the model directory as "
                "chat_template.jinja."
            )
        for i, message in enumerate(plain):
            if message["role"] == "developer" and "developer" not in self.source:
                message["role"] = "system"
            if message["role"] == "tool" and not self._has_tool_role:
                raise ValueError(f"messages[{i}].role: this model's chat template has no role 'tool'.")
            if "tool_calls" in message and "tool_calls" not in self.source:
                raise ValueError(f"messages[{i}].tool_calls: this model's chat template has no place for tool calls.")

    def _reads_arguments_as_objects(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """True if there are calls and the template takes their arguments apart."""
        return (
            any(isinstance(m, Mapping) and m.get("tool_calls") for m in messages)
            and not self._writes_arguments_verbatim
        )

    @functools.cached_property
    def _has_tool_role(self) -> bool:
        return re.search("""['"]tool['"]""", self.source) is not None

    @functools.cached_property
    def _writes_arguments_verbatim(self) -> bool:
        """True if the template writes the text of a call's arguments as it is. Others iterate over an object, or quote a string.

        Text is better where both work: the tokens of an earlier answer stay those that the model wrote."""
        call = {"id": "probe_id", "type": "function", "function": {"name": "probe", "arguments": _PROBE}}
        turns: list[dict[str, Any]] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            return _PROBE in self._render(turns, False, {})
        except TokenizerError:
            return False


def _before_mark(text: str) -> str:
    """The text up to the mark; without white space before it if the template has trimmed the content.

    Raises:
      ValueError: the template has dropped the mark, and so the message.
    """
    at = text.rfind(_END_MARK.strip())
    if at < 0:
        raise ValueError(
            "continue_final_message: this model's chat template does not write the last message's content."
        )
    return text[:at] if text.startswith(_END_MARK, at) else text[:at].rstrip()
