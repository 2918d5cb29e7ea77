"""The end of a process of a cluster."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import NoReturn

SAME_ERROR_SECONDS = 1.0
"""Time for the other processes to find the error of a setting that they share."""


def exit_now(code: int, *, after: float = 0.0) -> NoReturn:
    """Writes out the log and ends the process, from any thread.

    Python's own exit would wait for JAX's: up to five minutes for processes that are lost, and forever for a thread that is
    inside of a collective.

    Args:
      after: seconds to wait first: with process 0, JAX's coordination service ends, whose clients then abort without a word.
    """
    time.sleep(after)
    for handler in logging.getLogger().handlers:
        handler.flush()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
