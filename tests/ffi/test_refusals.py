"""Refusals of the handlers, which name the argument, what was expected and what came. On the CPU: the checks of shapes and dtypes are those
of the CUDA handlers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pytest

from jax_mla_cp.attention import fa3
from tests.helpers.attention_cases import ABSORBED, BF16, LATENT, ROPE, TARGETS, Case, make

pytest.importorskip("jax_mla_cp._ffi", reason="the extension is not built")


def _with(operand: int, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Case], Case]:
    def apply(case: Case) -> Case:
        operands = list(case.operands)
        operands[operand] = change(operands[operand])
        return dataclasses.replace(case, operands=tuple(operands))

    return apply


def _with_rows(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Case], Case]:
    def apply(case: Case) -> Case:
        new = {name: change(getattr(case.rows, name)) for name, change in changes.items()}
        return dataclasses.replace(case, rows=dataclasses.replace(case.rows, **new))

    return apply


def _narrow(dim: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: x.take(range(x.shape[dim] - 1), axis=dim)


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32)


EXPANDED, PREFILL, DECODE = "mla_prefill_expanded", "mla_prefill_absorbed", "mla_decode"
REFUSED = {
    # what is wrong: (targets, change, argument, expected, got)
    "q dtype": ([EXPANDED], _with(0, _wide), "q", r"expected bfloat16\[16, 2, 192\]", r"got float32\[16, 2, 192\]"),
    "q dim": ([EXPANDED], _with(0, _narrow(2)), "q", r"expected bfloat16\[16, 2, 192\]", r"got bfloat16\[16, 2, 191\]"),
    "kv heads": (
        [EXPANDED],
        _with(1, _narrow(1)),
        "kv",
        r"expected bfloat16\[\d+, 2, 320\]",
        r"got bfloat16\[\d+, 1, 320\]",
    ),
    "kv dtype": (
        [EXPANDED],
        _with(1, lambda x: x.astype(np.float16)),
        "kv",
        r"expected bfloat16\[",
        r"got dtype 10 \[",
    ),
    "kv dim": (
        [EXPANDED],
        _with(1, _narrow(2)),
        "kv",
        r"expected bfloat16\[\d+, 2, 320\]",
        r"got bfloat16\[\d+, 2, 319\]",
    ),
    "starts": ([EXPANDED], _with_rows(kv_start=_narrow(0)), "kv_start", r"expected int32\[2\]", r"got int32\[1\]"),
    "starts dtype": ([EXPANDED], _with_rows(kv_start=_wide), "kv_start", r"expected int32\[2\]", r"got float32\[2\]"),
    "latent dtype": (ABSORBED, _with(0, _wide), "q_latent", r"expected bfloat16\[2, 16, 512\]", r"got float32\["),
    "latent dim": (
        ABSORBED,
        _with(0, _narrow(2)),
        "q_latent",
        r"expected bfloat16\[2, 16, 512\]",
        r"got bfloat16\[2, 16, 511\]",
    ),
    "rope dim": (
        ABSORBED,
        _with(1, _narrow(2)),
        "q_rope",
        r"expected bfloat16\[16, 2, 64\]",
        r"got bfloat16\[16, 2, 63\]",
    ),
    "rope tokens": (
        ABSORBED,
        _with(1, lambda x: x[1:]),
        "q_rope",
        r"expected bfloat16\[16, 2, 64\]",
        r"got bfloat16\[15, 2, 64\]",
    ),
    "pages rank": (ABSORBED, _with(2, lambda x: x[0]), "pages", r"expected 3 dimensions", r"got bfloat16\[64, 576\]"),
    "pages dim": (
        ABSORBED,
        _with(2, _narrow(2)),
        "pages",
        r"expected bfloat16\[\d+, 64, 576\]",
        r"got bfloat16\[\d+, 64, 575\]",
    ),
    "pages dtype": (ABSORBED, _with(2, _wide), "pages", r"expected bfloat16\[", r"got float32\["),
    "page size": (
        ABSORBED,
        _with(2, lambda x: x[:, :48]),
        "pages",
        r"expected a page size that is a multiple of 64",
        "got 48",
    ),
    "table rank": (ABSORBED, _with(3, lambda x: x[0]), "page_table", r"expected 2 dimensions", r"got int32\["),
    "table rows": (
        ABSORBED,
        _with(3, lambda x: x[1:]),
        "page_table",
        r"expected int32\[2, \d+\]",
        r"got int32\[1, \d+\]",
    ),
    "table width": (
        ABSORBED,
        _with(3, lambda x: x[:, :0]),
        "page_table",
        "expected room for at least one page",
        "got none",
    ),
    "kv_len rank": (
        list(TARGETS),
        _with_rows(kv_len=lambda x: x[:, None]),
        "kv_len",
        "expected 1 dimensions",
        r"got int32\[2, 1\]",
    ),
    "cu_q short": (list(TARGETS), _with_rows(cu_q=_narrow(0)), "cu_q", r"expected int32\[3\]", r"got int32\[2\]"),
    "no rows": (
        list(TARGETS),
        _with_rows(cu_q=lambda x: x[:1], kv_len=lambda x: x[:0], kv_start=lambda x: x[:0]),
        "kv_len",
        "expected at least one row",
        "got none",
    ),
}
"""Calls that every platform refuses."""

REFUSED_VALUES = {
    "keys beyond the table": (
        ABSORBED,
        _with_rows(kv_len=lambda x: x + 10_000),
        "kv_len",
        "expected from that many to 256",
        "row 0",
    ),
    "keys beyond the packed": (
        [EXPANDED],
        _with_rows(kv_len=lambda x: x + 10_000),
        "kv_len",
        "expected from that many to",
        "row 0",
    ),
    "fewer keys than queries": (
        list(TARGETS),
        _with_rows(kv_len=lambda x: x * 0 + 2),
        "kv_len",
        "expected from that many",
        "row 0",
    ),
    "queries beyond the buffer": (
        list(TARGETS),
        _with_rows(cu_q=lambda x: np.add(x, [0, 0, 6])),
        "cu_q",
        "within the 16 tokens",
        "to 17",
    ),
    "queries before the buffer": (
        list(TARGETS),
        _with_rows(cu_q=lambda x: x - 4),
        "cu_q",
        "within the 16 tokens",
        "from -1",
    ),
    "falling": (list(TARGETS), _with_rows(cu_q=lambda x: np.add(x, [0, 5, 0])), "cu_q", "row 1", "-2 queries"),
    "start beyond the packed": (
        [EXPANDED],
        _with_rows(kv_start=lambda x: x + 999),
        "kv_start",
        "must lie within the",
        "row 0",
    ),
    "negative start": (
        [EXPANDED],
        _with_rows(kv_start=lambda x: x - 1),
        "kv_start",
        "must lie within the",
        "begin at -1",
    ),
    "page beyond": (ABSORBED, _with(3, lambda x: x + 99), "page_table", r"expected 0 to \d+", r"uses page \d+"),
    "negative page": (ABSORBED, _with(3, lambda x: x * 0 - 1), "page_table", r"expected 0 to \d+", "uses page -1"),
}
"""Calls that the CPU handlers refuse beside that: they can look into the index arrays."""


Change = Callable[[Case], Case]


def refuses(targets: Sequence[str], change: Change, argument: str, expected: str, got: str) -> None:
    for target in targets:
        case = change(make(target))
        rows = jax.tree.map(lambda x: np.asarray(x, x.dtype if x.dtype == np.float32 else np.int32), case.rows)
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as error:  # ValueError if JAX runs it at once
            dataclasses.replace(case, rows=rows).run(target)
        text = str(error.value)
        assert "INVALID_ARGUMENT" in text
        assert f"{target}: {argument}: " in text
        for pattern in (expected, got):
            assert re.search(pattern, text), f"{pattern!r} not in {text!r}"


@pytest.mark.parametrize("what", [*REFUSED, *REFUSED_VALUES])
def test_refuses(what: str) -> None:
    refuses(*(REFUSED | REFUSED_VALUES)[what])


def test_refuses_another_calls_splits() -> None:
    """They could be more than it has room for; and an array of another size."""
    case = make("mla_decode")
    tokens, heads = case.operands[1].shape[:2]
    scheduled = fa3.schedule(case.rows, tokens, heads)
    assert scheduled.splits is not None
    long = np.zeros((64, 256, LATENT), BF16), np.zeros((256, 64, ROPE), BF16), *case.operands[2:]
    with pytest.raises(
        ValueError, match=r"rows\.splits: made for at most 128 splits, this call of 256 tokens and 64 heads"
    ):
        TARGETS["mla_decode"](*long, scheduled, scale=case.scale)
    cut = dataclasses.replace(scheduled, splits=scheduled.splits[1:])
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"splits: expected int32\[16\], got int32\[15\]"):
        TARGETS["mla_decode"](*case.operands, cut, scale=case.scale)
