"""Chat templates can't reach Python or files, change their input, or run forever."""

from __future__ import annotations

import time

import pytest

from jax_mla_cp.tokenizer import ChatTemplate, TokenizerError, sandbox

MESSAGES = [{"role": "user", "content": "hello"}]


def render(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}, name="evil").render(MESSAGES)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "messages.__class__.__base__",
        "messages[0].__init__.__globals__",
        "messages|attr('__class__')|attr('__base__')",
        "messages[0]['content'].format.__self__.__class__",
        "'{0.__class__.__mro__}'.format(messages)",
        "'{x.__class__}'.format_map({'x': messages})",
        "messages|map(attribute='__class__')|list|first|attr('mro')",
        "raise_exception.__globals__['__builtins__']",
        "strftime_now.__code__.co_consts",
        "dict.__globals__",
        "dict.mro()",
        "namespace.__init__.__globals__",
        "namespace(x=1).__class__.__init__.__globals__",
        "namespace(__class__=1)",
        "namespace({'__class__': 1})",
        "cycler.__init__.__globals__.os.popen('id').read()",
        "joiner.__init__.__globals__",
        "lipsum.__globals__['os']",
        "self.__init__.__globals__",
        "self._TemplateReference__context.environment",
        "loop.__class__",
        "caller.__globals__",
        "messages.append({})",
        "messages.clear()",
        "messages[0].update(role='system')",
        "messages[0].pop('role')",
        "tojson.__globals__",
        "(messages|tojson).__class__",
        "open('/etc/passwd').read()",
        "__import__('os')",
        "range.__class__",
        "messages|list|sort(attribute='__class__.__name__')",
        "(messages|batch(1)|first).__class__",
    ],
)
def test_no_way_out(expression: str) -> None:
    """Either the template fails, or there is nothing there: an undefined value writes nothing."""
    try:
        text = render("{% for m in messages %}{{ " + expression + " }}{% endfor %}")
    except TokenizerError:
        return
    assert text in ("", "[{'role': 'user', 'content': 'hello'}]")


def test_a_template_may_keep_a_queue() -> None:
    source = "{% set ns = namespace(q=[]) %}{% set _ = ns.q.append('a') %}{{ ns.q.pop(0) }}{{ ns.q | length }}"
    assert render(source) == "a0"
    with pytest.raises(TokenizerError, match="unsafe"):
        render("{% set ns = namespace(q=[]) %}{{ ns.q.extend([1]) }}")


@pytest.mark.parametrize(
    "source",
    [
        "{% include '/etc/passwd' %}",
        "{% extends '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% from 'os' import popen %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% set messages[0].role = 'system' %}",
    ],
)
def test_refused_statements(source: str) -> None:
    with pytest.raises(TokenizerError, match="evil, line 1"):
        render(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ range(10**9) }}", "powers are not allowed"),
        ("{{ 2 ** 3 }}", "powers are not allowed"),
        ("\n{{ range(999999999) | list }}", "line 2: OverflowError: Range too big"),
        ("{{ 'a' * 999999999 }}", "a string or list of more than 16777216 elements"),
        ("{{ 999999999 * [0] }}", "a string or list of more than 16777216 elements"),
        (
            "{% set a = 'a' * 9999 %}{% for i in range(9999) %}{{ a }}{% endfor %}",
            "more than 16777216 characters of output",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", "evil"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "evil.*nested"),
        ("{{ 1 / 0 }}", "line 1: ZeroDivisionError"),
        ("{{ none.a.b }}", "line 1: 'None' has no attribute 'a'"),
    ],
)
def test_limits(source: str, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(TokenizerError, match=message):
        render(source)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %}",
    ],
)
def test_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    begin = time.monotonic()
    with pytest.raises(TokenizerError, match=r"evil.*: timed out after 0.2 s"):
        render(source)
    assert time.monotonic() - begin < 5


def test_nothing_is_computed_before_it_is_rendered() -> None:
    begin = time.monotonic()
    ChatTemplate("{{ 10 ** 10 ** 10 }}{{ ['a'] | join('b') | center(10000000) | length }}{{ 'a' * 10 ** 11 }}", {})
    assert time.monotonic() - begin < 1
