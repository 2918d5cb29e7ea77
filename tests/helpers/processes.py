"""Programs of this project as their users start them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def environment(**variables: str) -> dict[str, str]:
    """This process's and these, without what sets up its own devices."""
    return {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")} | variables


@contextlib.contextmanager
def started(
    module: str, *flags: str, errors: int | IO[str] = subprocess.PIPE, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """`python -m` a module, killed if it still runs at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        env=environment(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def server(
    *flags: str, errors: int | IO[str] = subprocess.PIPE, **variables: str
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """The server, on any free port unless the flags say which."""
    return started("jax_mla_cp.serve", "--port", "0", *flags, errors=errors, **variables)


def url_of(process: subprocess.Popen[str], log: Path | None = None) -> str:
    """The address of a server, without /v1, once it is ready.

    Args:
      log: where its standard error goes; None: to a pipe.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if match := re.search(r"ready in \d+ s: (http://\S+)/v1", line):
        return match[1]
    process.kill()
    errors = process.communicate()[1] if log is None else log.read_text()
    raise AssertionError(f"it is not ready: {line}{errors}")
