"""Constraints that were made to hurt: each ends soon, refused or usable, without much memory and without killing the process."""

from __future__ import annotations

import json
import resource
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from jax_mla_cp.engine import GrammarError
from jax_mla_cp.serve.structured_output import (
    Choice,
    Constraint,
    ContextFreeGrammar,
    JsonSchema,
    LarkGrammar,
    Regex,
)
from jax_mla_cp.serve.structured_output.pattern_budget import PatternBudget
from jax_mla_cp.serve.structured_output.schema_check import prepare
from tests.serve.structured_output.walking import GRAMMARS, allowed, refusal

SECONDS = 5  # an idle machine needs one at most
MEGABYTES = 300


def chain(length: int, step: Callable[[str], Any]) -> JsonSchema:
    """Definitions of which each refers to the next one."""
    steps = {f"{i:x}": step(f"#/$defs/{i + 1:x}") for i in range(length)}
    return JsonSchema({"$defs": {**steps, f"{length:x}": {"type": "object"}}, "$ref": "#/$defs/0"})


def lark_chain(length: int, rule: str, name: str) -> ContextFreeGrammar:
    rules = [rule.format(i, i + 1) for i in range(length)]
    return ContextFreeGrammar("\n".join([f"start: {name}0", *rules, f'{name}{length}: "a"']))


def patterns(count: int) -> list[Any]:
    return [{"pattern": f"a{i}.{{{i}}}b"} for i in range(count)]


def options(length: int) -> str:
    return ".?" * length


DOUBLING = {f"a{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2}] * 2} for i in range(20)}
REFUSED: dict[str, Constraint] = {
    "doubling schema": JsonSchema({"$defs": {**DOUBLING, "a20": {"type": "object"}}, "$ref": "#/$defs/a0"}),
    "multiplied alternatives": JsonSchema(
        {"allOf": [{"anyOf": [{"properties": {f"{i}_{j}": {}}, "type": "object"} for i in range(8)]} for j in range(8)]}
    ),
    "chain of references": chain(1400, lambda ref: {"$ref": ref}),
    "chain of alternatives": chain(1000, lambda ref: {"anyOf": [{"$ref": ref}]}),
    "intersected patterns": JsonSchema({"type": "string", "allOf": patterns(30)}),
    "intersected by references": JsonSchema(
        {"$defs": {f"{i}": {**p, "$ref": f"#/$defs/{min(i + 1, 29)}"} if i < 29 else p for i, p in enumerate(patterns(30))},
         "$ref": "#/$defs/0"}
    ),
    "long pattern": JsonSchema({"type": "string", "pattern": options(20_000)}),
    "many patterns": JsonSchema({"properties": {f"k{i}": {"pattern": f"{i}{options(500)}"} for i in range(60)}}),
    "many pattern properties": JsonSchema({"patternProperties": {f"^{i}{options(500)}": {} for i in range(60)}}),
    "brackets": JsonSchema({"type": "string", "pattern": "(" * 1000 + ")" * 1000}),
    "long regex": Regex(options(20_000)),
    "brackets in a regex": Regex("(" * 1000 + ")" * 1000),
    "counts in a regex": Regex("a{5000000000}"),
    "many choices": Choice(["a"] * 5000),
    "long choices": Choice(["a" * 70_000]),
    "long grammar": ContextFreeGrammar('start: "a"' + " " * 70_000),
    "long own grammar": LarkGrammar('start: "a"' + " " * (2 << 20)),
    "long terminal": ContextFreeGrammar(f"start: A\nA: {'B? ' * 20_000}\nB: /./"),
    "doubling terminals": ContextFreeGrammar(
        "\n".join(["start: A0", *(f"A{i}: A{i + 1} A{i + 1}" for i in range(30)), "A30: /.?/"])
    ),
    "terminals with options": ContextFreeGrammar(f"start: a\na: A\nA[lazy]: {'B? ' * 20_000}\nB: /./"),
    "chain of terminals": lark_chain(3900, 'A{}: "x" A{}', "A"),
    "intersected terminals": ContextFreeGrammar("start: A\nA: B & B & B & B\nB: C & C & C\nC: /a*b/"),
    "escapes without end": ContextFreeGrammar('start: "a" /' + "\\/" * 30_000),
    "quotes without end": ContextFreeGrammar('start: "' + '\\"' * 30_000),
    "nested rule": ContextFreeGrammar("start: " + "(" * 30_000),
    "nested schema in a grammar": ContextFreeGrammar("start: %json " + '{"items":' * 5000 + "{}" + "}" * 5000),
    "schemas in a grammar": LarkGrammar(
        "start: " + " | ".join(f'%json {{"pattern": "{i}{options(128)}"}}' for i in range(200))
    ),
    "GBNF with many rules": ContextFreeGrammar("\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(1000))])),
    "long GBNF": ContextFreeGrammar("root ::= " + '"a" ' * 10_000),
    "nested GBNF": ContextFreeGrammar("root ::= " + "(" * 8000 + '"a"' + ")" * 8000),
}  # fmt: skip
USABLE: dict[str, Constraint] = {
    "huge repetition": Regex("(ab|c){1,1000000}x{1000000000}"),
    "schema with repetitions": JsonSchema({"type": "string", "pattern": "(a{1,1000}){1,1000}b"}),
    "many states": JsonSchema({"type": "string", "pattern": ".*a.{900}b.*(x|y).{900}"}),
    "longest regex": Regex("(a|b)?" * 341),
    "huge array": JsonSchema({"type": "array", "minItems": 10**8, "maxItems": 10**9, "items": {"type": "integer"}}),
    "alternatives that begin alike": JsonSchema(
        {"anyOf": [{"type": "object", "properties": {f"k{i}": {"maxLength": 9}}} for i in range(100)]}
    ),
    "chain of properties": chain(900, lambda ref: {"properties": {"x": {"$ref": ref}}, "type": "object"}),
    "chain of items": chain(400, lambda ref: json.loads('{"items":' * 12 + json.dumps({"$ref": ref}) + "}" * 12)),
    "chain of rules": lark_chain(5000, "r{}: r{}", "r"),
    "chain of nested rules": lark_chain(1900, 'r{}: ("b" | "a" (r{} "x")?)*', "r"),
    "ambiguous rules": ContextFreeGrammar('start: e\ne: e e e e | e e e | e e | "a"'),
    "repeated rules": ContextFreeGrammar('start: ((((a "b"){1,1000}){1,1000}){1,1000}){1,1000}\na: "a"'),
    "most choices": Choice([f"v{i}" for i in range(4096)]),
    "many tagged branches": JsonSchema(
        {"oneOf": [{"type": "object", "required": ["k"], "properties": {"k": {"const": f"{i}"}}} for i in range(600)]}
    ),
}

TAKEN: dict[str, Constraint] = {
    "nested repetitions": Regex("((((a{100}){100}){100}){100}){100}"),
    "many properties": JsonSchema(
        {"type": "object", "properties": {f"k{i}": {"type": "integer"} for i in range(2100)}}
    ),
    "options": Regex(options(1000)),
    "alternatives that begin alike": JsonSchema(
        {"anyOf": [{"type": "object", "properties": {f"k{i}": {"maxLength": 9}}} for i in range(1000)]}
    ),
}


def in_time(run: Callable[[], None]) -> None:
    """Runs on a thread with a small stack, as a server's may have."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except BaseException as error:
            errors.append(error)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    usual = threading.stack_size(1 << 20)
    thread = threading.Thread(target=guarded)
    thread.start()
    threading.stack_size(usual)
    thread.join()
    if errors:
        raise errors[0]
    assert time.monotonic() - started < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10 < MEGABYTES


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    def run() -> None:
        assert 5 < len(refusal(REFUSED[name])) <= 500

    in_time(run)


def walk(constraint: Constraint) -> None:
    """Accepts some tokens."""
    grammar = GRAMMARS.compile(constraint)
    for _ in range(20):
        tokens = allowed(grammar.copy())
        grammar.accept(tokens[len(tokens) // 2])
        if grammar.finished:
            break


@pytest.mark.parametrize("name", USABLE)
def test_usable(name: str) -> None:
    in_time(lambda: walk(USABLE[name]))


@pytest.mark.parametrize("name", TAKEN)
def test_taken_but_too_much_for_its_own_answer(name: str) -> None:
    def run() -> None:
        with pytest.raises(GrammarError, match="can't be continued"):
            walk(TAKEN[name])

    in_time(run)


def test_looking_for_the_place_of_a_fault_takes_no_time() -> None:
    def run() -> None:
        many = {f"k{i}": {"type": "string", "pattern": f"^[a-z]{{2,{i + 3}}}$"} for i in range(500)}
        fault = {"oneOf": [{"type": "integer"}, {"type": "number"}]}
        assert "the branches of oneOf" in refusal({"properties": {**many, "z": fault}})

    in_time(run)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "multipleOf": 2**53},
        {"type": "integer", "multipleOf": 1e300},
        {"type": "number", "multipleOf": 0.1234567},
        {"allOf": [{"type": "integer", "multipleOf": n} for n in (2, 3, 5, 7, 11, 13, 17, 19)]},
    ],
    ids=["large", "huge", "many digits", "together"],
)
def test_multiples_are_bounded(schema: dict[str, Any]) -> None:
    """Their automata would take minutes and gigabytes."""
    with pytest.raises(GrammarError, match="multipleOf"):
        prepare(schema, PatternBudget())
    for value in (0.01, 5, 100, 10_000):
        prepare({"type": "number", "multipleOf": value}, PatternBudget())
