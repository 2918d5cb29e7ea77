"""The progress bar of a loading checkpoint."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def loading_bar(
    total_bytes: int, tensors: int, *, show: bool | None = None, title: str = "loading weights"
) -> Iterator[Callable[[int], None]]:
    """Yields `advance(nbytes)`, to be called once per tensor.

    Args:
      show: draw it on stderr; None draws it if stderr is a terminal. Only the first process draws.
    """
    wanted = sys.stderr.isatty() if show is None else show
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TextColumn("tensor {task.fields[done]}/{task.fields[tensors]}"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not wanted or jax.process_index() != 0,
    )
    task = bar.add_task("", total=total_bytes, done=0, tensors=tensors)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += 1
        bar.update(task, advance=nbytes, done=done)

    with bar:
        yield advance


def report_loaded(tensors: int, nbytes: int, seconds: float) -> None:
    """Logs what a loader has done; the same line for every kind of checkpoint."""
    _log.info(
        "loaded %d tensors, %.2f GB, in %.1f s (%.2f GB/s)", tensors, nbytes / 1e9, seconds, nbytes / 1e9 / seconds
    )
