"""Chat templates as programs: Jinja's sandbox, set up as transformers does it (`utils/chat_template_utils.py`).

A template comes with a checkpoint, and so from whoever made that. It gets plain data and no files, and it can't reach
Python's internals: what an attribute's name or a method could lead to is what Jinja's `ImmutableSandboxedEnvironment`
refuses. Against templates that never end or write without end there are limits, far above what real ones need. They are
not complete: a single filter may still ask for more memory than there is.
"""

from __future__ import annotations

import contextvars
import json
import time
import traceback
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jax_mla_cp.tokenizer.errors import TokenizerError

MAX_SOURCE = 1 << 18
"""Characters of a template; real ones have some thousand."""
MAX_TEXT = 1 << 24
"""Characters that a template may write: more than any model's context. Also the longest text or list made with `*`."""
MAX_SECONDS = 10.0
"""A template's time; real ones take milliseconds."""

_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline")


class Program:
    """A compiled template."""

    def __init__(self, source: str, name: str):
        """
        Raises:
          TokenizerError: no Jinja, or longer than `MAX_SOURCE`.
        """
        self._name = name
        if len(source) > MAX_SOURCE:
            raise TokenizerError(name, f"{len(source)} characters; a template may have {MAX_SOURCE}.")
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except Exception as error:  # what it is depends on whether Jinja's parser or Python's compiler gives up
            raise self._failed(error) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """
        Raises:
          TokenizerError: whatever goes wrong in the template, with its line; `raise_exception`; a limit.
        """
        pieces, length = [], 0
        token = _deadline.set(time.monotonic() + MAX_SECONDS)
        try:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_TEXT:
                    raise SecurityError(f"more than {MAX_TEXT} characters of text")
                _check_time()
        except Exception as error:  # the template is a program: it may raise anything
            raise self._failed(error) from error
        finally:
            _deadline.reset(token)
        return "".join(pieces)

    def _failed(self, error: Exception) -> TokenizerError:
        line = getattr(error, "lineno", None)
        for frame in traceback.extract_tb(error.__traceback__):
            line = frame.lineno if frame.filename == "<template>" else line
        where = f"{self._name}, line {line}" if line else self._name
        what = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        return TokenizerError(where, what)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Of functions, macros and methods: nothing that takes long does without."""
        _check_time()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed")
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(count, int) and len(sequence) * count > MAX_TEXT:
                raise SecurityError(f"a text or list of more than {MAX_TEXT} elements")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant wrote, for training; here it is its contents."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _PlainNamespace(Namespace):
    """Without names that mean something to Python."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't have {name!r}; names must not begin with an underscore")


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError(f"not done after {MAX_SECONDS:g} s")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own `tojson` is for HTML, and escapes `<` and `'`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _environment() -> _Sandbox:
    # Not optimized: constants would be computed at compile time, without limits. No loader: templates have no files.
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_new_dict, namespace=_PlainNamespace
    )
    return environment


_ENVIRONMENT = _environment()
