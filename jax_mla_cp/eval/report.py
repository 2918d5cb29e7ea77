"""What has been found: rows, scores, the table on the terminal and the JSON file."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from jax_mla_cp.eval.prompts import Prompt

_MOST_NATS = 700.0
"""exp of more is no float64."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt and what was answered."""

    length: int
    depth: float
    prompt_tokens: int
    """As the target counts them."""
    expected: str
    got: str
    correct: bool


class Report:
    """Collects a run's results."""

    def __init__(self, prompts: Sequence[Prompt], argv: Sequence[str]):
        self._prompts = prompts
        self._rows: list[Row | None] = [None] * len(prompts)
        self._argv = list(argv)
        self._started = time.perf_counter()
        self.perplexity: float | None = None
        """exp of the mean negative log-likelihood of a token."""
        self.perplexity_tokens = 0
        self.no_perplexity: str | None = None
        """Why there is none."""
        self.stopped: str | None = None
        """Why the run ended before its end."""
        self.facts: dict[str, Any] = {"model": None, "device": None, "mesh": None, "versions": {}}

    def answered(self, index: int, prompt_tokens: int, text: str) -> Row:
        prompt = self._prompts[index]
        row = Row(prompt.length, prompt.depth, prompt_tokens, prompt.passkey.key, text, prompt.is_answered_by(text))
        self._rows[index] = row
        return row

    def scored(self, logprobs: Sequence[float]) -> None:
        """Takes the log-probabilities of all tokens that were predicted."""
        mean = math.fsum(logprobs) / len(logprobs) if all(map(math.isfinite, logprobs)) else math.nan
        if -_MOST_NATS <= mean <= 0:
            self.perplexity, self.perplexity_tokens = math.exp(-mean), len(logprobs)
        else:
            self.no_perplexity = f"the tokens' mean log-probability is {mean:g}"

    @property
    def rows(self) -> list[Row]:
        """Those that are answered, in the order of the prompts."""
        return [row for row in self._rows if row is not None]

    @property
    def passkey_accuracy(self) -> float | None:
        """Correct ones of those answered."""
        return sum(row.correct for row in self.rows) / len(self.rows) if self.rows else None

    def cells(self) -> dict[tuple[int, float], bool | None]:
        """(length, depth) -> whether the answer was correct, or None if there is none yet."""
        return {
            (prompt.length, prompt.depth): None if row is None else row.correct
            for prompt, row in zip(self._prompts, self._rows, strict=True)
        }

    def axes(self) -> tuple[list[int], list[float]]:
        """The lengths and depths of the cells, rising."""
        return sorted({prompt.length for prompt in self._prompts}), sorted({prompt.depth for prompt in self._prompts})

    def summary(self) -> list[str]:
        """The scores, one a line."""
        parts = []
        if self._prompts:
            right, answered, asked = sum(row.correct for row in self.rows), len(self.rows), len(self._prompts)
            of = f"{right} of {answered}" + (f"; {asked} asked" if answered < asked else "")
            accuracy = self.passkey_accuracy
            parts.append(f"passkey accuracy {'unknown' if accuracy is None else f'{accuracy:.4f}'} ({of})")
        if self.perplexity is not None:
            parts.append(f"perplexity {self.perplexity:.4f} ({self.perplexity_tokens} tokens)")
        elif self.no_perplexity:
            parts.append(f"no perplexity: {self.no_perplexity}")
        return parts

    def as_dict(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {
            "passkey_accuracy": self.passkey_accuracy,
            "perplexity": self.perplexity,
            "perplexity_tokens": self.perplexity_tokens,
            "no_perplexity": self.no_perplexity,
            "stopped": self.stopped,
            **self.facts,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "argv": self._argv,
            "seconds": time.perf_counter() - self._started,
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n")

    def show(self, console: Console) -> None:
        """Prints the table and the scores."""
        cells = self.cells()
        lengths, depths = self.axes()
        if cells:
            table = Table(title="passkeys found, by depth", title_justify="left")
            table.add_column("tokens", justify="right")
            for depth in depths:
                table.add_column(f"{depth:.2f}", justify="center")
            table.add_column("found", justify="right")
            for length in lengths:
                line = [cells[length, depth] for depth in depths]
                found, asked = sum(cell is True for cell in line), sum(cell is not None for cell in line)
                table.add_row(str(length), *(_MARKS[cell] for cell in line), f"{found} of {asked}")
            console.print(table)
        for row in [row for row in self.rows if not row.correct][:10]:
            console.print(
                f"- {row.length} tokens, depth {row.depth:.2f}: expected {row.expected}, got {escape(repr(row.got))}"
            )
        model, mesh = self.facts["model"], self.facts["mesh"]
        console.print(escape(f"{model}{f', {mesh}' if mesh else ''}: {', '.join(self.summary())}"), soft_wrap=True)
        if self.stopped:
            console.print(escape(f"not complete: {self.stopped}"), soft_wrap=True)


_MARKS = {True: Text("yes", "green"), False: Text("no", "bold red"), None: Text("-", "dim")}
