"""Agreement of the processes on what makes their programs and results: a difference ends all of them with one sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.member import Member


def agree(member: Member, about: str, facts: Mapping[str, object]) -> None:
    """Compares all processes' facts. Every process must call it, and raises the same error.

    Args:
      about: names the comparison.
      facts: by the option or property that they are about.

    Raises:
      ConfigError: a process differs from process 0.
    """
    cluster = member.cluster
    with member.expect_exit():
        texts = cluster.store.exchange(about, json.dumps({name: str(value) for name, value in facts.items()}))
        first, *others = (json.loads(text) for text in texts)
        for process, other in enumerate(others, 1):
            for name in [*first, *(other.keys() - first.keys())]:
                if first.get(name) != other.get(name):
                    raise ConfigError(
                        name,
                        f"must be the same in all processes: {cluster.name(process)} has {_shown(other.get(name))}, "
                        f"{cluster.name(0)} has {_shown(first.get(name))}. Start all with the same command, version and files.",
                    )


def _shown(value: str | None) -> str:
    return "none" if value is None else value if len(value) <= 200 else f"{value[:200]}..."
