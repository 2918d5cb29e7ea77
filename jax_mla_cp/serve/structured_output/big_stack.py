"""Calls on a thread with a large stack."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# llguidance recurses over definitions that refer to one another. On a stack of 8 MiB, a schema of 20,000 characters is enough
# to overflow it, which kills the process; 64 MiB hold what the limits on length allow, several times over.
_STACK_BYTES = 256 << 20
_lock = threading.Lock()


def with_big_stack(function: Callable[[], T]) -> T:
    """Returns the function's result, or raises its exception. Memory is only used for the part of the stack that is touched."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="compile-grammar", daemon=True)
    with _lock:
        usual = threading.stack_size(_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
