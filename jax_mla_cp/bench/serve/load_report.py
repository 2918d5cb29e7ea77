"""A load test's results: percentiles, throughput, goodput and failures; tables on the terminal and the JSON file."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jax_mla_cp.bench.serve.request_result import RequestResult
from jax_mla_cp.version import package_version

PERCENTILES = (50, 90, 95, 99)

_GOODPUT_LATENCY: dict[str, Callable[[RequestResult], float]] = {
    "ttft": lambda r: r.ttft,
    "e2e": lambda r: r.e2e,
    "tpot": lambda r: r.tpot or 0.0,
    "itl": lambda r: max(r.itl, default=0.0),
}
"""Seconds that a bound of --goodput is compared with."""


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """A run's results, computed from its requests as they are now."""

    results: Sequence[RequestResult]
    goals: dict[str, float]
    """Bounds of --goodput, in seconds."""
    metadata: dict[str, Any]
    """Entries for the JSON file: model, server, versions, settings."""
    stopped: bool = False

    @property
    def succeeded(self) -> list[RequestResult]:
        """The requests that succeeded."""
        return [result for result in self.results if result.ok]

    @property
    def seconds(self) -> float:
        """Duration of the run: from its start to the end of the last answer."""
        return max((r.end for r in self.results if r.end is not None), default=0.0)

    def latencies(self) -> dict[str, list[float]]:
        """Latencies in seconds, by name, of the requests that succeeded."""
        done = self.succeeded
        return {
            "TTFT": [r.ttft for r in done],
            "ITL": [gap for r in done for gap in r.itl],
            "TPOT": [tpot for r in done if (tpot := r.tpot) is not None],
            "E2E": [r.e2e for r in done],
            "sent late": [r.late for r in done],
        }

    def failures(self) -> dict[str, tuple[int, str]]:
        """The number of failures by kind, each with the message of one of them."""
        failed = [r for r in self.results if r.error is not None]
        counts = collections.Counter(r.error for r in failed)
        kinds = {str(kind): (n, next(r.message for r in failed if r.error == kind)) for kind, n in counts.most_common()}
        if unfinished := sum(r.end is None for r in self.results):
            kinds["not finished"] = (unfinished, "the run was stopped before they finished")
        return kinds

    def max_in_flight(self) -> int:
        """The maximum number of requests at the server at a time."""
        return max((n for _, n in self.in_flight()), default=0)

    def in_flight(self) -> list[tuple[float, int]]:
        """The number of requests at the server over time: (seconds, number from then on), in ascending order."""
        sent = [(r.sent, 1) for r in self.results if r.sent is not None]
        ended = [(r.end, -1) for r in self.results if r.end is not None]
        levels, level = [], 0
        for moment, change in sorted(sent + ended):  # an end before a start at the same time
            level += change
            levels.append((moment, level))
        return levels

    def rows(self) -> list[dict[str, Any]]:
        """The tables' rows: latencies in milliseconds, then throughput, goodput, and one row per kind of failure."""
        rows = [_percentiles(name, values) for name, values in self.latencies().items()]
        done, seconds = self.succeeded, self.seconds
        prompt = sum(r.planned.prompt_tokens if r.prompt_tokens is None else r.prompt_tokens for r in done)
        output = sum(r.output_tokens for r in done)

        def rate(n: int) -> float | None:
            return n / seconds if seconds else None

        rows.append(
            {
                "table": "throughput",
                "what": "all requests",
                "requests": len(self.results),
                "succeeded": len(done),
                "seconds": seconds,
                "requests_s": rate(len(done)),
                "in_tokens": prompt,
                "cached_tokens": sum(r.cached_tokens for r in done),
                "in_tokens_s": rate(prompt),
                "out_tokens": output,
                "out_tokens_s": rate(output),
                "most_in_flight": self.max_in_flight(),
            }
        )
        if self.goals:
            kept = sum(all(_GOODPUT_LATENCY[name](r) <= bound for name, bound in self.goals.items()) for r in done)
            what = ", ".join(f"{name} <= {bound * 1e3:g} ms" for name, bound in self.goals.items())
            rows.append(
                {
                    "table": "goodput",
                    "what": what,
                    "requests": kept,
                    "of": len(self.results),
                    "fraction": kept / len(self.results),
                    "requests_s": rate(kept),
                }
            )
        for kind, (count, message) in self.failures().items():
            rows.append({"table": "failures", "what": kind, "n": count, "message": message})
        return rows

    def as_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {
            "command": "serve",
            "device": None,  # the server's, which OpenAI's API doesn't tell
            **self.metadata,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "stopped": self.stopped,
            "rows": self.rows(),
            "requests": [_request(result) for result in self.results],
        }

    def save(self, path: Path) -> None:
        """Writes the JSON file atomically."""
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")
        os.replace(part, path)

    def show(self, console: Console) -> None:
        """Prints the tables."""
        versions = ", ".join(f"{name} {version}" for name, version in self.metadata["versions"].items())
        console.print(escape(f"{self.metadata['model']} at {self.metadata['server']} ({versions})"), soft_wrap=True)
        rows = self.rows()
        for name in dict.fromkeys(row["table"] for row in rows):
            console.print(_table(name, [row for row in rows if row["table"] == name]))
        if self.stopped:
            console.print("stopped with Ctrl-C: the tables hold what was measured until then.")


def versions(server: dict[str, str]) -> dict[str, str]:
    """Versions of the server, as it tells them, and of this client."""
    client = {
        "client": package_version(),
        "aiohttp": importlib.metadata.version("aiohttp"),
        "python": platform.python_version(),
    }
    return {**{f"server {key}": value for key, value in server.items()}, **client}


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, Any]:
    row: dict[str, Any] = {"table": "latency, ms", "what": name, "n": len(seconds)}
    values = np.asarray(seconds, np.float64) * 1e3
    row["mean"] = float(values.mean()) if len(values) else None
    for percent in PERCENTILES:
        row[f"p{percent}"] = float(np.percentile(values, percent)) if len(values) else None
    row["most"] = float(values.max()) if len(values) else None
    return row


def _request(result: RequestResult) -> dict[str, Any]:
    measured = {key: value for key, value in vars(result).items() if key != "planned"}
    planned = {
        "at": result.planned.at,
        "asked_prompt": result.planned.prompt_tokens,
        "asked_output": result.planned.output_tokens,
        "group": result.planned.group,
    }
    return planned | measured


_TITLES = {
    "requests_s": "requests/s",
    "in_tokens_s": "in tokens/s",
    "out_tokens_s": "out tokens/s",
    "in_tokens": "in tokens",
    "out_tokens": "out tokens",
    "cached_tokens": "of them cached",
    "most_in_flight": "most in flight",
}


def _table(name: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=name, title_justify="left")
    keys = [key for key in rows[0] if key != "table"]
    for key in keys:
        text = isinstance(rows[0][key], str)
        table.add_column(_TITLES.get(key, key), justify="left" if text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(_format(row[key])) for key in keys))
    return table


def _format(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
