"""The compiled extension (ffi/module.cc)."""

from typing import Any

def registrations() -> dict[str, dict[str, Any]]:
    """Platform -> target name -> handler capsule."""

def built_for_cuda() -> int:
    """CUDA's version, as 1000 major + 10 minor; 0: only CPU handlers."""

def driver_cuda() -> int:
    """The newest CUDA version that this machine's driver runs; 0: no driver."""
