"""Failures of steps that the engine tells apart."""

from __future__ import annotations


class RunnerFailed(RuntimeError):
    """The runner can run no further step, and can't be reset."""


class PageTableLost(RuntimeError):
    """The devices used another page table than the host meant. `reset` helps: it sends the whole anew."""
