"""Sandbox for chat templates: Jinja's, set up as in transformers (`utils/chat_template_utils.py`).

A template is untrusted code that comes with a checkpoint. It gets plain data and no files, and Jinja's
`ImmutableSandboxedEnvironment` keeps it from reaching Python's internals through attributes and methods. Limits on time and
output, far above what real templates need, stop endless ones. The limits are not complete: a single filter may still ask for
more memory than there is.
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
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from jax_mla_cp.tokenizer.errors import TokenizerError

MAX_SOURCE_CHARS = 1 << 18
"""Length of a template; real ones have a few thousand characters."""
MAX_OUTPUT_CHARS = 1 << 24
"""Length of the rendered text: more than any model's context. Also the longest string or list made with `*`."""
MAX_SECONDS = 10.0
"""Time to render a template; real ones take milliseconds."""

_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline")


class SandboxedTemplate:
    """A compiled template."""

    def __init__(self, source: str, name: str):
        """
        Raises:
          TokenizerError: it is not valid Jinja, or longer than `MAX_SOURCE_CHARS`.
        """
        self._name = name
        if len(source) > MAX_SOURCE_CHARS:
            raise TokenizerError(name, f"{len(source)} characters; the limit for a template is {MAX_SOURCE_CHARS}.")
        try:
            self._template = _ENVIRONMENT.from_string(source)
            self.variables = frozenset(meta.find_undeclared_variables(_ENVIRONMENT.parse(source)))
            """The names that the template reads and does not define."""
        except Exception as error:  # its type depends on whether Jinja's parser or Python's compiler fails
            raise self._error(error) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Renders the template.

        Raises:
          TokenizerError: any error in the template, with its line; `raise_exception`; a limit.
        """
        pieces, length = [], 0
        token = _deadline.set(time.monotonic() + MAX_SECONDS)
        try:
            given = {name: _Given(value) if isinstance(value, list) else value for name, value in variables.items()}
            for piece in self._template.generate(given):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_OUTPUT_CHARS:
                    raise SecurityError(f"more than {MAX_OUTPUT_CHARS} characters of output")
                _check_deadline()
        except Exception as error:  # the template is a program: it may raise anything
            raise self._error(error) from error
        finally:
            _deadline.reset(token)
        return "".join(pieces)

    def _error(self, error: Exception) -> TokenizerError:
        line = getattr(error, "lineno", None)
        for frame in traceback.extract_tb(error.__traceback__):
            line = frame.lineno if frame.filename == "<template>" else line
        where = f"{self._name}, line {line}" if line else self._name
        message = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        return TokenizerError(where, message)


class _Given(list[Any]):
    """A list that a template is given: it can't change it while it walks through it."""


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Lets a template keep a queue in a list of its own, as Kimi's does with the ids of calls."""
        is_own = type(obj) is list  # not a `_Given`
        return (is_own and attr in ("append", "pop")) or super().is_safe_attribute(obj, attr, value)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Checks the deadline at every call of a function, macro or method: nothing takes long without any."""
        _check_deadline()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise SecurityError("powers are not allowed")
        for sequence, count in ((left, right), (right, left)):
            if (
                isinstance(sequence, str | list | tuple)
                and isinstance(count, int)
                and len(sequence) * count > MAX_OUTPUT_CHARS
            ):
                raise SecurityError(f"a string or list of more than {MAX_OUTPUT_CHARS} elements")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text, for training; here it only renders its contents."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _PlainNamespace(Namespace):
    """A namespace without names that begin with an underscore."""

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


def _check_deadline() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError(f"timed out after {MAX_SECONDS:g} s")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML escapes; Jinja's own `tojson` escapes `<` and `'`."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _environment() -> _Sandbox:
    # Not optimized: constants would be folded at compile time, without limits. No loader: templates can't include files.
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_new_dict, namespace=_PlainNamespace
    )
    return environment


_ENVIRONMENT = _environment()
