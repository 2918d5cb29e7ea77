"""The installation: this package's version, and the error for a package that is missing. Imports nothing but Python's own."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib import metadata


def package_version() -> str:
    """The installed version; "not installed" for a source tree that is run as it is."""
    try:
        return metadata.version("jax-mla-cp")
    except metadata.PackageNotFoundError:
        return "not installed"


@contextlib.contextmanager
def program_imports(*, program: bool = True) -> Iterator[None]:
    """Guards the imports of a program: with a missing dependency the process ends with code 2 and one line that says how to
    install it, instead of a traceback.

    Args:
      program: False leaves the error to the caller, for a module that is imported by libraries too.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "jax_mla_cp").partition(".")[0]
        if name == "jax_mla_cp" or not program:
            raise
        command = sys.orig_argv[sys.orig_argv.index("-m") + 1] if "-m" in sys.orig_argv else "jax_mla_cp.serve"
        print(
            f"error: {sys.executable} has no package {name}. In the source tree, run `make env` once and then "
            f"`.venv/bin/python -m {command}`; or install everything with `pip install .`",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


def starts_program() -> bool:
    """Python is looking for the module of `python -m jax_mla_cp.PROGRAM`, and imports the packages around it."""
    return sys.argv[:1] == ["-m"]
