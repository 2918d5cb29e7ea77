"""The key-value store of JAX's coordination service, which the processes use while they start."""

from __future__ import annotations

from collections import Counter
from typing import Any

from jax_mla_cp.distributed.exit import Unreachable

JOINING = 120.0
"""Seconds that a process waits for another one's value before the processes watch each other."""
WATCHED = 7 * 24 * 3600.0
"""The same when they do: a process that is lost ends all, and one that reads weights may take as long as it needs."""


class Store:
    """Values that processes publish for each other. Process 0's coordination service holds them."""

    def __init__(self, client: Any, process_id: int, num_processes: int):
        self._client, self._process_id, self._num_processes = client, process_id, num_processes
        self._exchanged: Counter[str] = Counter()

    def publish(self, name: str, value: str) -> None:
        """Publishes this process's value of a name, once."""
        self._client.key_value_set(_key(name, self._process_id), value)

    def read(self, name: str, process: int, timeout: float = JOINING) -> str:
        """Waits for a process's value of a name.

        Raises:
          Unreachable: it has not come within `timeout` seconds: the process is lost.
        """
        try:
            value: str = self._client.blocking_key_value_get(_key(name, process), int(timeout * 1000))
        except Exception as error:  # jaxlib's own classes: the deadline, or a coordinator that is gone
            reason = str(error).splitlines()[0]
            raise Unreachable(
                "coordinator", f"process {process} did not answer ({name}): {reason}. Its own log may say why."
            ) from error
        return value

    def exchange(self, name: str, value: str, timeout: float = WATCHED) -> list[str]:
        """Publishes a value and waits for all processes' values, which must make the same exchanges in the same order. Returns
        after all of them have read all."""
        self._exchanged[name] += 1
        name = f"{name} {self._exchanged[name]}"
        self.publish(name, value)
        values = [self.read(name, process, timeout) for process in range(self._num_processes)]
        try:
            self._client.wait_at_barrier(f"{_PREFIX}/{name}", int(timeout * 1000))
        except Exception as error:
            raise Unreachable("coordinator", f"a process was lost ({name}): {str(error).splitlines()[0]}.") from error
        return values


_PREFIX = "jax_mla_cp"


def _key(name: str, process: int) -> str:
    return f"{_PREFIX}/{name}/{process}"
