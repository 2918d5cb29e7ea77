"""Which version of this package runs."""

from __future__ import annotations

from importlib import metadata


def package_version() -> str:
    """As it is installed; "not installed" for a source tree that is run as it is."""
    try:
        return metadata.version("jax-mla-cp")
    except metadata.PackageNotFoundError:
        return "not installed"
