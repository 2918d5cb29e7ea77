"""The end of a process of a cluster."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn


def exit_now(code: int) -> NoReturn:
    """Writes out the log and ends the process, from any thread.

    Python's own exit would wait for JAX's: up to five minutes for processes that are lost, and forever for a thread that is
    inside of a collective.
    """
    for handler in logging.getLogger().handlers:
        handler.flush()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
