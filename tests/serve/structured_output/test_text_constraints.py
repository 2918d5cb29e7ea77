"""Regular expressions, choices and grammars."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_mla_cp.serve.structured_output import Choice, ContextFreeGrammar, LarkGrammar, Regex
from tests.helpers.byte_tokenizer import EOS
from tests.serve.structured_output.walking import accepts, refusal

ARITHMETIC = 'start: sum\nsum: term (("+" | "-") term)*\nterm: INT | "(" sum ")"\nINT: /[0-9]+/'
GBNF = """
# The root
root ::= sum
sum  ::= term (("+" | "-") term)*
term ::= [0-9]+ | "(" sum ")"   # in parentheses
"""


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("[a-z]{3}", ["abc"], ["ab", "abcd", "ABC"]),
        ("^(yes|no)$", ["yes", "no"], ["yes ", ""]),
        ("a$|^b", ["a", "b"], ["ab"]),
        (r"\d{3}-\d{4}", ["123-4567"], ["1234567"]),
        (r"https?://\S+/", ["http://a/"], ["http:/a/"]),
        (r"(?i)abc|[^x]", ["aBc", "é"], ["x"]),
        ("a*", ["", "aa"], ["b"]),
    ],
)
def test_regex_matches_the_whole_answer(pattern: str, yes: list[str], no: list[str]) -> None:
    assert all(accepts(Regex(pattern), text) for text in yes)
    assert not any(accepts(Regex(pattern), text) for text in no)


@settings(max_examples=60, deadline=None)
@given(
    choices=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6), min_size=1, max_size=6),
    other=st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)
def test_choices_are_literal(choices: list[str], other: str) -> None:
    for text in (*choices, other):
        assert accepts(Choice(choices), text) == (text in choices)


def test_choices_that_begin_alike_or_look_like_syntax() -> None:
    choices = ["yes", "yes sir", 'a"|/b/', "<|eos|>", "\x7f\n\\"]
    assert all(accepts(Choice(choices), text) for text in choices)
    assert not accepts(Choice(choices), "yes ") and not accepts(Choice(["."]), "a")


@pytest.mark.parametrize(
    "text", [ARITHMETIC, ARITHMETIC.replace("start", "?start"), f"%llguidance {{}}\n{ARITHMETIC}", GBNF]
)
def test_grammars_in_lark_and_gbnf(text: str) -> None:
    assert all(accepts(ContextFreeGrammar(text), answer) for answer in ("1", "1+(2-3)", "((12))"))
    assert not any(accepts(ContextFreeGrammar(text), answer) for answer in ("", "1+", "(1", "1*2"))


def test_schemas_in_a_grammar_are_prepared() -> None:
    """Unknown formats in them are annotations, and no option of theirs turns the enforcement off."""
    schema = '{"type": "array", "items": {"format": "iri", "type": "string"}, "x-guidance": {"lenient": true}}'
    for kind in (ContextFreeGrammar, LarkGrammar):
        constraint = kind(f'start: "<" %json {schema} ">"\n// %json in a comment, and "%json" in a text')
        assert accepts(constraint, '<["?"]>') and not accepts(constraint, "<[1]>")
    assert "at /items: `not` can't be enforced" in refusal(LarkGrammar('start: %json {"items": {"not": {}}}'))
    assert "at /items: the branches of oneOf" in refusal(LarkGrammar('start: %json {"items": {"oneOf": [true, {}]}}'))


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (Regex("(a"), "invalid regular expression: unclosed group. Correct it."),
        (Regex("(?=a)b"), "look-around, including look-ahead and look-behind, is not supported"),
        (Regex(r"(a)\1"), "backreferences are not supported"),
        (Regex(r"\bfoo"), "\\b and other look-around can't be enforced"),
        (Regex("[^\\x00-\\U0010FFFF]"), "no output satisfies it"),
        (Regex("\ud800"), "a lone surrogate"),
        (Choice([]), "expected 1 to 4096 choices, got 0"),
        (Choice(["a", ""]), "must not be empty"),
        (Choice(["\ud800"]), "a lone surrogate"),
        (ContextFreeGrammar(""), "it is empty"),
        (ContextFreeGrammar('x: "a"'), "there is no rule `start`"),
        (ContextFreeGrammar('start: "a"\nstart: "b"'), "line 2: a rule that is defined twice"),
        (ContextFreeGrammar('start: "a" b'), "line 1: b is not defined"),
        (ContextFreeGrammar("start: 'a'"), "line 1: unexpected character"),
        (ContextFreeGrammar('start: "a" %json {\n"type": "null"\n} "c"\nx: "d"\nx: "e"'), "line 5: a rule that is defined twice"),
        (ContextFreeGrammar('start: "a'), "line 1: a text or regular expression has no end"),
        (ContextFreeGrammar('start: ("a"'), "the grammar's syntax is wrong here"),
        (ContextFreeGrammar("start: /(a/"), "line 1: invalid regular expression: unclosed group"),
        (ContextFreeGrammar("start: start"), "no output satisfies it"),
        (ContextFreeGrammar('start: A\nA: A "x"'), "line 2: a terminal that refers to itself"),
        (ContextFreeGrammar("%import foo.INT\nstart: INT"), "only the terminals of `common` can be imported"),
        (ContextFreeGrammar("start: @other"), "@ refers to another grammar"),
        (ContextFreeGrammar("start: <[9999]>"), "a token id outside the vocabulary"),
        (ContextFreeGrammar('start.2: "a"'), "priorities"),
        (ContextFreeGrammar('start: g\ng[stop="x"]: /a*/'), "the option stop has no effect here"),
        (ContextFreeGrammar("start: g\ng[temperature=0.5]: /a*/"), "the option temperature has no effect here"),
        (ContextFreeGrammar("start: %json {oops}"), "%json must be followed by valid JSON"),
        (ContextFreeGrammar('root ::= "a" b'), "the rule b is not defined"),
        (ContextFreeGrammar('root ::= "a"\nroot ::= "b"'), "the rule root is defined twice"),
        (ContextFreeGrammar('answer ::= "a"'), "there is no rule `root`"),
        (ContextFreeGrammar('root ::= "x" ("a"'), "the grammar's syntax is wrong in line 1"),
        (ContextFreeGrammar('root ::= "a\\'), "the grammar's syntax is wrong"),
        (ContextFreeGrammar('root ::= a-b\na-b ::= "x"\na_b ::= "y"'), "names that differ only in"),
        (ContextFreeGrammar('root ::= a\na ::= a "x"'), "no output satisfies it"),
    ],
)  # fmt: skip
def test_refusals(constraint: Regex | Choice | ContextFreeGrammar, message: str) -> None:
    assert message in refusal(constraint)


def test_end_token_is_not_text() -> None:
    """The end token's spelling in an answer is text."""
    assert accepts(Regex(".*"), "<|eos|>") and accepts(ContextFreeGrammar(f'start: "a" <[{EOS}]>'), "a")
