"""`Member`: what process 0's side of a cluster and the others' have in common."""

from __future__ import annotations

import abc
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.cluster import Cluster
from jax_mla_cp.distributed.exit import FAILED, INVALID

log = logging.getLogger(__name__)

OWN_REASON_SECONDS = 3.0
"""Time for a process to find a reason itself for which all others end."""


class Member(abc.ABC):
    """This process's side of a cluster."""

    def __init__(self, cluster: Cluster):
        self.cluster = cluster
        self._expecting = threading.Event()

    @abc.abstractmethod
    def fail_here(self, reason: str, code: int = FAILED) -> None:
        """Ends all processes for a reason of this one. May return before this one has ended."""

    @abc.abstractmethod
    def drain(self) -> None:
        """Has all processes end when the requests have ended. Returns at once."""

    @contextlib.contextmanager
    def expect_exit(self) -> Iterator[None]:
        """A block in which all processes may end for a reason that each of them finds itself. If it raises, this one does."""
        self._expecting.set()
        yield
        self._expecting.clear()

    @contextlib.contextmanager
    def failing_all(self, describe: Callable[[ConfigError], str] = str) -> Iterator[None]:
        """A block whose errors end all processes, each of which logs the reason; those of `expect_exit` are raised.

        Args:
          describe: tells a setting's error in the words of the program's user.
        """
        try:
            yield
        except ConfigError as error:
            if self._expecting.is_set():
                raise
            self._end_all(describe(error), INVALID)
        except Exception as error:
            log.exception("this process failed")
            self._end_all(f"{type(error).__name__}: {error}", FAILED)

    def _end_all(self, reason: str, code: int) -> None:
        self.fail_here(reason, code)
        threading.Event().wait()  # until this process ends
