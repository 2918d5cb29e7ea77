"""Checks of a conversion's directories before anything is written: usable, locked by one process, of the same source, with
enough free space on the disk."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jax_mla_cp.checkpoint.errors import CheckpointError
from jax_mla_cp.checkpoint.orbax import MANIFEST, ConvertedCheckpoint, command, is_converted, mixed_problem
from jax_mla_cp.config.errors import ConfigError

_LOCK = f".{MANIFEST}.lock"


def check_directories(source: Path, out: Path, *, overwrite: bool) -> None:
    """`out` is made if there is none.

    Raises:
      ConfigError: `source` is no Hugging Face directory, or `out` is none to convert to.
    """
    if not source.is_dir():
        raise ConfigError("model", f"{source} is not a directory. Give a Hugging Face model directory.")
    if is_converted(source):
        problem = mixed_problem(source) or "a converted checkpoint already. Give the Hugging Face directory."
        raise ConfigError("model", f"{source} is {problem}")
    if out.resolve() == source.resolve():
        raise ConfigError("out", f"{out} is `model` itself. Name another directory.")
    if out.exists() and not out.is_dir():
        raise ConfigError("out", f"{out} is a file. Name another directory.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        foreign = any(not path.name.startswith(f".{MANIFEST}") for path in out.iterdir())
        if foreign and not (out / MANIFEST).exists() and not (overwrite and is_converted(out)):
            raise ConfigError(
                "out",
                f"{out} is not empty, and not a converted checkpoint that could be continued. Name another directory.",
            )
    except OSError as error:
        raise ConfigError("out", f"{out} can't be used ({error.strerror}). Name another directory.") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise ConfigError("out", f"{out} can't be written. Name another directory.")


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Holds a lock on a file in the directory. A process that is killed leaves the file, but not the lock.

    Raises:
      ConfigError: another process holds it.
    """
    path = out / _LOCK
    with path.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                "out", f"another process is converting to {out} ({error.strerror}). Wait for it, or end it."
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def check_same(old: ConvertedCheckpoint, new: ConvertedCheckpoint, source: Path, out: Path) -> None:
    """Refuses to go on with a conversion that `source` did not begin.

    Raises:
      CheckpointError: another checkpoint's, or other arrays.
    """
    if old.fingerprint != new.fingerprint or old.arrays != new.arrays:
        changed = "has changed since" if old.source == new.source else f"is not {old.source}"
        raise CheckpointError(
            "out",
            f"{out} holds a conversion of another checkpoint: {source} {changed}. To throw away what is there: "
            f"{command(source, out)} --overwrite",
        )


def check_room(checkpoint: ConvertedCheckpoint) -> None:
    """Checks that the missing chunks fit the disk.

    Raises:
      CheckpointError: they don't.
    """
    missing = sum(
        array.chunk_bytes
        for array in checkpoint.arrays.values()
        for chunk in array.chunk_files()
        if not (checkpoint.directory / chunk).exists()
    )
    free = shutil.disk_usage(checkpoint.directory).free
    if missing > free:
        raise CheckpointError(
            "out",
            f"{checkpoint.directory} needs {missing / 1e9:.2f} GB more, its disk has {free / 1e9:.2f} GB free. "
            "Make room, or name a directory on another disk.",
        )
