"""Schemathesis over the server's own /openapi.json: requests made from it, answers held to it."""

from __future__ import annotations

import collections
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import CHECKS, load_all_checks

from jax_mla_cp.serve.schemas.base import asks_nothing

MAX_TOKENS = 4
"""Valid requests generate at most so much: their number is what finds faults, not their length."""
_EXCLUDED = (
    "positive_data_acceptance",  # a schema can't say that a prompt has to fit the model, or that a model exists
    "unsupported_method",  # asked of each operation again and again; once is enough, tests/serve does
)


def operations(url: str) -> list[Any]:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    schema.config.generation.update(modes=list(schemathesis.GenerationMode))
    return [result.ok() for result in schema.get_all_operations()]


def fuzz(operation: Any, examples: int, model: str, *, seed: int = 0) -> collections.Counter[int]:
    """Sends so many generated requests, valid and not, to one operation; those that name a model name the server's.

    Returns: how often each status was answered.

    Raises:
      Exception: of schemathesis, for an answer that breaks the schema or is a 5xx, with curl to repeat it.
    """
    load_all_checks()
    excluded = CHECKS.get_by_names(_EXCLUDED)
    seen: collections.Counter[int] = collections.Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy())
    def send(case: Any) -> None:
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = model
            if operation.path.endswith("/completions"):
                _limit(case.body)
        answer = case.call(timeout=60)
        seen[answer.status_code] += 1
        lenient = CHECKS.get_by_names(("negative_data_rejection",)) if _asks_nothing(case.body) else []
        case.validate_response(answer, excluded_checks=[*excluded, *lenient])

    send()
    return seen


def _asks_nothing(value: Any) -> bool:
    """True if a field somewhere in a body asks for nothing: the server takes it, also where the schema has no such field."""
    if isinstance(value, list):
        return any(_asks_nothing(part) for part in value)
    return isinstance(value, dict) and any(asks_nothing(part) or _asks_nothing(part) for part in value.values())


def _limit(body: dict[str, Any]) -> None:
    """Keeps an answer short, and leaves what is no valid number of tokens as it is."""
    given = [name for name in ("max_tokens", "max_completion_tokens") if name in body]
    for name in given or ["max_tokens"]:
        wanted = body.get(name)
        if wanted is None or (type(wanted) is int and wanted > MAX_TOKENS):
            body[name] = MAX_TOKENS
