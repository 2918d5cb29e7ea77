"""What has been measured: percentiles, throughput, goodput, failures; tables on the terminal and the JSON file."""

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

from jax_mla_cp.bench.serve.client import Answer
from jax_mla_cp.version import package_version

PERCENTILES = (50, 90, 95, 99)

_GOAL: dict[str, Callable[[Answer], float]] = {
    "ttft": lambda a: a.ttft,
    "e2e": lambda a: a.e2e,
    "tpot": lambda a: a.tpot or 0.0,
    "itl": lambda a: max(a.gaps, default=0.0),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """A run's results, of the answers as they are now."""

    answers: Sequence[Answer]
    goals: dict[str, float]
    """Bounds in seconds."""
    facts: dict[str, Any]
    """model, server, versions, settings."""
    stopped: bool = False

    @property
    def good(self) -> list[Answer]:
        """Those that succeeded."""
        return [answer for answer in self.answers if answer.ok]

    @property
    def seconds(self) -> float:
        """From the start until the last answer was complete."""
        return max((a.end for a in self.answers if a.end is not None), default=0.0)

    def latencies(self) -> dict[str, list[float]]:
        """Seconds by name, of the requests that succeeded."""
        good = self.good
        return {
            "TTFT": [a.ttft for a in good],
            "ITL": [gap for a in good for gap in a.gaps],
            "TPOT": [tpot for a in good if (tpot := a.tpot) is not None],
            "E2E": [a.e2e for a in good],
            "sent late": [a.late for a in good],
        }

    def failures(self) -> dict[str, tuple[int, str]]:
        """How many by kind, and what one of them says."""
        failed = [a for a in self.answers if a.error is not None]
        counts = collections.Counter(a.error for a in failed)
        kinds = {str(kind): (n, next(a.message for a in failed if a.error == kind)) for kind, n in counts.most_common()}
        if unfinished := sum(a.end is None for a in self.answers):
            kinds["not finished"] = (unfinished, "the run was stopped before")
        return kinds

    def most_in_flight(self) -> int:
        """The most requests that the server had at a time."""
        return max((n for _, n in self.in_flight()), default=0)

    def in_flight(self) -> list[tuple[float, int]]:
        """(seconds, requests at the server from then on), rising in time."""
        sent = [(a.sent, 1) for a in self.answers if a.sent is not None]
        ended = [(a.end, -1) for a in self.answers if a.end is not None]
        levels, level = [], 0
        for moment, change in sorted(sent + ended):  # an end before a start at the same time
            level += change
            levels.append((moment, level))
        return levels

    def rows(self) -> list[dict[str, Any]]:
        """The tables' rows: latencies in milliseconds, then one of throughput, one of goodput, one per kind of failure."""
        rows = [_percentiles(name, values) for name, values in self.latencies().items()]
        good, seconds = self.good, self.seconds
        prompt = sum(a.planned.prompt_tokens if a.prompt_tokens is None else a.prompt_tokens for a in good)
        output = sum(a.output_tokens for a in good)

        def rate(n: int) -> float | None:
            return n / seconds if seconds else None

        rows.append(
            {
                "table": "throughput",
                "what": "all requests",
                "requests": len(self.answers),
                "succeeded": len(good),
                "seconds": seconds,
                "requests_s": rate(len(good)),
                "in_tokens": prompt,
                "cached_tokens": sum(a.cached_tokens for a in good),
                "in_tokens_s": rate(prompt),
                "out_tokens": output,
                "out_tokens_s": rate(output),
                "most_in_flight": self.most_in_flight(),
            }
        )
        if self.goals:
            kept = sum(all(_GOAL[name](a) <= bound for name, bound in self.goals.items()) for a in good)
            what = ", ".join(f"{name} <= {bound * 1e3:g} ms" for name, bound in self.goals.items())
            rows.append(
                {
                    "table": "goodput",
                    "what": what,
                    "requests": kept,
                    "of": len(self.answers),
                    "fraction": kept / len(self.answers),
                    "requests_s": rate(kept),
                }
            )
        for kind, (count, message) in self.failures().items():
            rows.append({"table": "failures", "what": kind, "n": count, "message": message})
        return rows

    def as_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "command": "serve",
            "device": None,  # of the server: OpenAI's API has no word for it
            **self.facts,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "stopped": self.stopped,
            "rows": self.rows(),
            "requests": [_request(answer) for answer in self.answers],
        }

    def save(self, path: Path) -> None:
        """Writes the JSON file, at once or not at all."""
        part = path.with_name(f".{path.name}.part")
        part.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")
        os.replace(part, path)

    def show(self, console: Console) -> None:
        """Prints the tables."""
        versions = ", ".join(f"{name} {version}" for name, version in self.facts["versions"].items())
        console.print(escape(f"{self.facts['model']} at {self.facts['server']} ({versions})"), soft_wrap=True)
        rows = self.rows()
        for name in dict.fromkeys(row["table"] for row in rows):
            console.print(_table(name, [row for row in rows if row["table"] == name]))
        if self.stopped:
            console.print("stopped with Ctrl-C: the tables hold what was measured until then.")


def versions(server: dict[str, str]) -> dict[str, str]:
    """Of the server, as it tells them, and of this client."""
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


def _request(answer: Answer) -> dict[str, Any]:
    facts = {key: value for key, value in vars(answer).items() if key != "planned"}
    planned = {
        "at": answer.planned.at,
        "asked_prompt": answer.planned.prompt_tokens,
        "asked_output": answer.planned.output_tokens,
        "group": answer.planned.group,
    }
    return planned | facts


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
