"""The end of a program that may be one of several processes."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

from jax_mla_cp.cli import print_error
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.distributed.cluster_options import ClusterOptions

FAILED, INVALID = 1, 2
"""Exit codes: after a failure, when a new start may help, and for a setting that can't work."""
_SAME_ERROR_SECONDS = 1.0
"""Time for the other processes to find the error of a setting that they share."""
_FLUSH_SECONDS = 3.0

log = logging.getLogger(__name__)


class Unreachable(ConfigError):
    """Other processes are not there, or not yet: starting again may help."""


def exit_now(code: int, *, after: float = 0.0) -> NoReturn:
    """Writes out the log and ends the process, from any thread.

    Python's own exit would wait for JAX's: up to five minutes for processes that are lost, and forever for a thread that is
    inside of a collective.

    Args:
      after: seconds to wait first. When process 0 ends, JAX's coordination service does, and its clients abort without a word.
    """
    time.sleep(after)
    last = threading.Timer(_FLUSH_SECONDS, os._exit, (code,))  # a reader that hangs
    last.daemon = True
    last.start()
    for stream in (*logging.getLogger().handlers, sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # a reader that is gone
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def ending_program(
    options: ClusterOptions, parser: argparse.ArgumentParser, command: str | None = None
) -> Iterator[None]:
    """A program's run. An error of its settings is printed and ends it with code 2; as one of several processes, every error
    ends it without JAX's shutdown.

    Args:
      parser, command: as in `print_error`.
    """
    try:
        yield
    except ConfigError as error:
        print_error(error, parser, command)
        if options.is_cluster:
            exit_now(FAILED if isinstance(error, Unreachable) else INVALID, after=_SAME_ERROR_SECONDS)
        sys.exit(INVALID)
    except Exception:
        if not options.is_cluster:
            raise
        log.exception("this process failed")
        exit_now(FAILED)
