"""The error for a setting that can't work."""

from __future__ import annotations


class ConfigError(ValueError):
    """A setting that can't work: names the setting, what it got, what is allowed and what to change."""
