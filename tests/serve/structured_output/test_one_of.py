"""Branches of `oneOf` that exclude one another, and those that don't."""

from __future__ import annotations

from typing import Any

import pytest

from jax_mla_cp.serve.structured_output.one_of import are_disjoint


def tagged(value: Any, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"k": value}, "required": ["k"], **more}


A, B = tagged({"const": "a"}), tagged({"enum": ["b", "c"]})
ROOT = {"$defs": {"a": A, "b": B, "tag": {"const": "b"}, "loop": {"$ref": "#/$defs/loop"}, "n": {"type": "integer"}}}


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/$defs/{name}"}


@pytest.mark.parametrize(
    "branches",
    [
        [A, B],
        [ref("a"), ref("b")],
        [A, tagged(ref("tag"))],
        [ref("a"), {"type": ["null", "string"]}, {"type": "integer"}],
        [A],
        [],
    ],
)
def test_disjoint(branches: list[Any]) -> None:
    assert are_disjoint(ROOT, branches)


@pytest.mark.parametrize(
    "branches",
    [
        [{"type": "number"}, {"type": "integer"}],
        [A, A],
        [A, tagged({"enum": ["a", "b"]})],
        [A, tagged({"const": 1})],  # only texts are compared
        [tagged({"const": 1}), tagged({"const": 1.0})],
        [A, {**B, "required": []}],
        [A, {**B, "type": ["object", "null"]}, {"type": "null"}],
        [{k: v for k, v in A.items() if k != "type"}, {k: v for k, v in B.items() if k != "type"}],  # 5 matches both
        [ref("loop"), A],
        [ref("missing"), A],
        [True, A],
        [{"type": "string"}] * 100,
    ],
)
def test_not_disjoint(branches: list[Any]) -> None:
    assert not are_disjoint(ROOT, branches)
