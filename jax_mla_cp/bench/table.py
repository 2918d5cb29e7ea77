"""Results of a benchmark: rows, any of which may fail alone, and targets; tables on the terminal and the JSON file."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from jax_mla_cp.bench.mock import is_mocked
from jax_mla_cp.bench.roofline import Ceilings, Cost
from jax_mla_cp.platform import versions

_TITLES = {
    "ms": "ms",
    "n": "n",
    "tflops": "TFLOP/s",
    "gbs": "GB/s",
    "roof_ms": "roof ms",
    "fraction": "of roof",
    "seq": "tokens",
    "vs": "x faster",
    "ep_axes": "experts over",
    "args_gb": "held GB",
    "temp_gb": "temp GB",
    "memory_gb": "run GB",
    "total_gb": "all layers GB",
    "load_gbs": "GB/s",
    "cpu_s": "CPU s",
    "host_gb": "host GB",
    "peak": "of local shards",
}
_DIGITS = {"fraction": 3, "efficiency": 3, "tokens_per_s": 0, "balance": 3, "gbs": 0, "n": 0}


@dataclasses.dataclass(frozen=True)
class Hold:
    """A target for a measured number. `seen` None: this run has not measured it."""

    what: str
    bound: float
    at_least: bool
    seen: float | None

    @property
    def ok(self) -> bool | None:
        if self.seen is None:
            return None
        return self.seen >= self.bound if self.at_least else self.seen <= self.bound


class Report:
    """Collects a run's rows. The JSON file is written after each, so that an interrupted run leaves what it has."""

    def __init__(self, command: str, argv: Sequence[str], *, path: Path | None = None, quiet: bool = False):
        self.command = command
        self.argv = list(argv)
        self.ceilings: Ceilings | None = None
        self.rows: list[dict[str, Any]] = []
        self.holds: list[Hold] = []
        self.notes: list[str] = []
        self._path = path
        self._started = time.perf_counter()
        self._console = Console(stderr=True, quiet=quiet, highlight=False)

    def say(self, text: str) -> None:
        """Prints a line of progress to stderr."""
        self._console.print(
            f"[dim]{time.perf_counter() - self._started:6.1f} s[/dim]  {text}", markup=True, soft_wrap=True
        )

    def row(self, table: str, name: str, run: Callable[[], dict[str, Any]], **facts: Any) -> dict[str, Any] | None:
        """Runs one measurement and adds its row to a table.

        Args:
          run: returns the measured columns; an exception becomes the row's `error`.
          facts: the row's other columns, which a failed row has too.

        Returns: the row, or None if it failed.
        """
        row: dict[str, Any] = {"table": table, "what": name, **facts}
        label = f"{table}: {name} " + " ".join(f"{key}={value}" for key, value in facts.items())
        started = time.perf_counter()
        with self._console.status(label) if self._console.is_terminal else contextlib.nullcontext():
            try:
                row |= run()
            except Exception as error:
                row["error"] = _in_a_line(error)
        took = time.perf_counter() - started
        self.rows.append(row)
        seen = row["error"] if "error" in row else f"{row['ms']:.4g} ms" if "ms" in row else ""
        self.say(f"{label}: [bold]{_escape(seen)}[/bold] (took {took:.1f} s)")
        self.save()
        return None if "error" in row else row

    def beside_roof(self, cost: Cost, seconds: float) -> dict[str, float]:
        """Columns that compare a measured time with its roofline, at the ceilings of this run."""
        if self.ceilings is None:
            raise RuntimeError("the ceilings must be measured before the rows.")
        return cost.row(seconds, self.ceilings)

    def hold(
        self, what: str, seen: float | None, *, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        """Compares a measured number with its target. None: not measured, because its row failed."""
        bound = at_least if at_least is not None else at_most
        assert bound is not None
        self.holds.append(Hold(what, bound, at_least is not None, seen))
        self.save()

    @property
    def failed(self) -> int:
        """The number of rows that failed."""
        return sum("error" in row for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        device = jax.local_devices()[0]
        return {
            "command": self.command,
            "device": device.device_kind,
            "platform": device.platform,
            "devices": {"local": jax.local_device_count(), "all": jax.device_count()},
            "processes": 1 if is_mocked() else jax.process_count(),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "argv": self.argv,
            "seconds": time.perf_counter() - self._started,
            "ceilings": None if self.ceilings is None else dataclasses.asdict(self.ceilings),
            "rows": self.rows,
            "holds": [{**dataclasses.asdict(hold), "ok": hold.ok} for hold in self.holds],
            "notes": self.notes,
        }

    def save(self) -> None:
        """Writes the JSON file, if there is one, atomically."""
        if self._path is not None:
            part = self._path.with_name(f".{self._path.name}.part")
            part.write_text(json.dumps(self.as_dict(), indent=1, default=_plain, allow_nan=False) + "\n")
            os.replace(part, self._path)

    def show(self, console: Console | None = None) -> None:
        """Prints the tables to stdout."""
        console = console or Console(width=None if sys.stdout.isatty() else 220, highlight=False)
        device = jax.local_devices()[0]
        many = "" if jax.device_count() == jax.local_device_count() else f", {jax.process_count()} processes"
        mocked = f" as 1 of {jax.device_count()} (mocked)" if is_mocked() else many
        console.print(f"{device.device_kind}{mocked}, {', '.join(f'{k} {v}' for k, v in versions().items())}")
        if self.ceilings:
            c = self.ceilings
            console.print(
                f"ceilings of this run: matmul {c.matmul / 1e12:.4g} TFLOP/s, copy {c.copy / 1e9:.4g} GB/s (read + written), "
                f"read {c.read / 1e9:.4g} GB/s"
            )
        for name in dict.fromkeys(row["table"] for row in self.rows):
            console.print(_table(name, [row for row in self.rows if row["table"] == name]))
        for note in self.notes:
            console.print(f"- {_escape(note)}")
        if self.holds:
            console.print(_hold_table(self.holds))
        if self.failed:
            console.print(f"[bold]{self.failed} of {len(self.rows)} rows failed.[/bold]")


_HIDDEN = {"table", "calls", "spread", "error"}


def _table(name: str, rows: list[dict[str, Any]]) -> Table:
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in _HIDDEN]
    same = {key: rows[0].get(key) for key in keys if len(rows) > 1 and _same(rows, key)}
    caption = ", ".join(f"{_TITLES.get(key, key)} {_format(key, value)}" for key, value in same.items())
    table = Table(title=name, title_justify="left", caption=caption and f"all rows: {caption}", caption_justify="left")
    shown = [key for key in keys if key not in same]
    for key in shown:
        number = all(isinstance(row.get(key, 0), int | float) for row in rows)
        table.add_column(_TITLES.get(key, key.replace("_", " ")), justify="right" if number else "left")
    failed = any("error" in row for row in rows)
    if failed:
        table.add_column("error", overflow="fold")
    for row in rows:
        cells = [_escape(_format(key, row.get(key))) for key in shown]
        table.add_row(*cells, *([_escape(row.get("error", ""))] if failed else []))
    return table


def _same(rows: list[dict[str, Any]], key: str) -> bool:
    """True for a setting, not a measurement, with one value in all rows: it is shown once, below the table."""
    first = rows[0].get(key)
    return key != "what" and isinstance(first, str | int) and all(row.get(key) == first for row in rows)


def _hold_table(holds: list[Hold]) -> Table:
    table = Table(title="numbers to hold", title_justify="left")
    for column in ("what", "hold", "seen", ""):
        table.add_column(column, justify="left" if column in ("what", "") else "right")
    for hold in holds:
        seen = "not measured" if hold.seen is None else f"{hold.seen:.4g}"
        sign = ">=" if hold.at_least else "<="
        verdict = {None: "[bold]?[/bold]", True: "[green]ok[/green]", False: "[bold red]missed[/bold red]"}[hold.ok]
        table.add_row(_escape(hold.what), f"{sign} {hold.bound:g}", seen, verdict)
    return table


def _format(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{_DIGITS[key]}f}" if key in _DIGITS else f"{value:.4g}"
    return str(value)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def _in_a_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
