"""Chat templates: from the messages of a conversation to the text of a prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_mla_cp.tokenizer.errors import TokenizerError
from jax_mla_cp.tokenizer.sandbox import SandboxedTemplate
from jax_mla_cp.tokenizer.tokenizer_config import read_text, special_tokens

ROLES = ("system", "user", "assistant")


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

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Renders the text of a conversation.

        Args:
          messages: each has `role`, one of `ROLES`, and `content`, a string or a list of `{"type": "text", "text": ...}`,
            which are concatenated. The template decides whether roles must alternate.
          add_generation_prompt: end with the beginning of an assistant message.
          variables: further variables of the template, for example DeepSeek-V3.1's `thinking`; JSON values.

        Raises:
          ValueError: a message or variable does not have this form.
          TokenizerError: the template refuses the messages, fails, or exceeds a limit of `sandbox`.
        """
        try:
            json_values = json.loads(json.dumps(variables))  # templates must not reach the methods of other objects
        except (TypeError, ValueError) as error:
            raise ValueError(f"variables for the chat template: expected JSON values: {error}") from error
        return self._template.render(
            {"tools": None, "documents": None}  # defined, as in transformers
            | self._special_tokens
            | json_values
            | {"messages": plain_messages(messages), "add_generation_prompt": add_generation_prompt}
        )


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Reduces messages to `role` and `content`, both strings.

    >>> plain_messages([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])
    [{'role': 'user', 'content': 'ab'}]

    Raises:
      ValueError: there are none, or one does not have the form that `ChatTemplate.render` takes.
    """
    if isinstance(messages, str | Mapping) or not messages:
        raise ValueError("messages: expected a list of one or more messages.")
    return [_plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain_message(message: Mapping[str, Any], where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected an object with role and content, got {type(message).__name__}.")
    if extra := sorted(map(str, message.keys() - {"role", "content"})):
        raise ValueError(f"{where}.{extra[0]}: not supported; a message has role and content.")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}.role: expected one of {', '.join(ROLES)}, got {role!r}.")
    if isinstance(content, list | tuple):
        content = "".join(_part_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(f"{where}.content: expected a string or a list of text parts, got {type(content).__name__}.")
    return {"role": role, "content": content}


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f'{where}: expected {{"type": "text", "text": ...}}; other parts are not supported.')
    return part["text"]
