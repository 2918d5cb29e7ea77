"""Calls on a thread with a large stack."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
# llguidance recurses over definitions that refer to one another, and a stack that overflows kills the process. A schema within
# the limits overflows 8 MiB; 64 MiB were enough for the worst that was tried.
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
