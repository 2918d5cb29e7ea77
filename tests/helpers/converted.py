"""Files of a converted checkpoint, and damage to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jax_mla_cp.checkpoint import convert as converting


def chunks(out: Path) -> dict[str, bytes]:
    """Contents of all chunk files that are there."""
    return {
        str(path.relative_to(out)): path.read_bytes() for path in out.glob("weights/state/*/c/**/*") if path.is_file()
    }


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def stop_after(slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends conversions with KeyboardInterrupt after some slices."""
    real, read = converting._Slice.read, iter(range(slices))

    def stopping(self: Any, *of: Any) -> Any:
        if next(read, None) is None:
            raise KeyboardInterrupt
        return real(self, *of)

    monkeypatch.setattr(converting._Slice, "read", stopping)
