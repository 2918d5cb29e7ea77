"""Conversations to prompts, by the chat template that a model brings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_mla_cp.tokenizer.errors import TokenizerError
from jax_mla_cp.tokenizer.sandbox import Program
from jax_mla_cp.tokenizer.settings import read_text, special_tokens

ROLES = ("system", "user", "assistant")


class ChatTemplate:
    """A Jinja template that writes the text of a conversation, as transformers' `apply_chat_template` renders it."""

    def __init__(self, source: str, settings: Mapping[str, Any], *, name: str = "chat_template"):
        """
        Args:
          settings: tokenizer_config.json; templates take `bos_token` and its like from there.
          name: what error messages call the template.

        Raises:
          TokenizerError: no Jinja, or longer than templates are.
        """
        self.source = source
        self._program = Program(source, name)
        self._special_tokens = special_tokens(settings)

    @classmethod
    def from_dir(cls, folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """chat_template.jinja, else the settings' template; None if there is neither."""
        path = folder / "chat_template.jinja"
        return cls(read_text(path), settings, name=str(path)) if path.is_file() else cls.from_settings(settings)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """`chat_template`: the text, or a list of named ones, of which "default" is taken; None if there is none.

        Raises:
          TokenizerError: another form, no "default", or as the constructor.
        """
        name = "tokenizer_config.json: chat_template"
        source = settings.get("chat_template")
        if isinstance(source, list):
            named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
            name, source = f"{name} 'default'", named.get("default")
            if source is None:
                raise TokenizerError(name, f"no such template; the list has {sorted(map(str, named))}.")
        if source is None:
            return None
        if not isinstance(source, str):
            raise TokenizerError(name, f"expected text, got {type(source).__name__}.")
        return cls(source, settings, name=name)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of a conversation.

        Args:
          messages: each with `role`, one of `ROLES`, and `content`, text or a list of `{"type": "text", "text": ...}`,
            whose texts are joined without anything between. Whether roles must alternate is the template's matter.
          add_generation_prompt: end with what begins an answer of the assistant.
          variables: what else the template reads, for example DeepSeek-V3.1's `thinking`; values as in JSON.

        Raises:
          ValueError: a message or variable that is not of this form.
          TokenizerError: the template refuses the messages, fails, or comes to a limit of `sandbox`.
        """
        try:
            plain = json.loads(json.dumps(variables))  # a template must not get at the methods of other objects
        except (TypeError, ValueError) as error:
            raise ValueError(f"variables for the chat template: expected values as in JSON: {error}") from error
        return self._program.render(
            {"tools": None, "documents": None}  # there, if empty, as in transformers
            | self._special_tokens
            | plain
            | {"messages": plain_messages(messages), "add_generation_prompt": add_generation_prompt}
        )


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Messages with `role` and `content`, both text.

    Raises:
      ValueError: there are none, or one is not of the form that `ChatTemplate.render` takes.
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
        content = "".join(_text(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise ValueError(f"{where}.content: expected text or a list of text parts, got {type(content).__name__}.")
    return {"role": role, "content": content}


def _text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f'{where}: expected {{"type": "text", "text": ...}}; other parts are not supported.')
    return part["text"]
