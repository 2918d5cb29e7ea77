"""Progress bar and log lines of a checkpoint that is loaded, converted or read."""

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
def progress_bar(
    title: str, total_bytes: int, count: int, unit: str, *, show: bool | None = None
) -> Iterator[Callable[[int], None]]:
    """Yields `advance(nbytes)`, to be called once for each of the `count` units, "tensor" for example.

    Args:
      show: draw it on stderr; None draws it if stderr is a terminal. Only the first process draws.
    """
    draw = sys.stderr.isatty() if show is None else show
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        DownloadColumn(),
        TextColumn(unit + " {task.fields[done]}/{task.fields[count]}"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not draw or jax.process_index() != 0,
    )
    task = bar.add_task("", total=total_bytes, done=0, count=count)
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += 1
        bar.update(task, advance=nbytes, done=done)

    with bar:
        yield advance


def log_loading(nbytes: int, devices: int) -> None:
    """Logs the size of the weights before they are loaded."""
    _log.info("loading %.2f GB of weights onto %d %s", nbytes / 1e9, devices, "device" if devices == 1 else "devices")


def log_loaded(tensors: int, nbytes: int, seconds: float) -> None:
    """Logs what a loader has done, in the same words for both kinds of checkpoint."""
    _log.info(
        "loaded %d tensors, %.2f GB, in %.1f s (%.2f GB/s)", tensors, nbytes / 1e9, seconds, nbytes / 1e9 / seconds
    )
