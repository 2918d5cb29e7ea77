"""The evaluation's results: rows, scores, the table on the terminal and the JSON file."""

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

from jax_mla_cp.eval.corpus import PasskeyPrompt

_MAX_NATS = 700.0
"""exp of more overflows float64."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt and the model's answer."""

    length: int
    depth: float
    prompt_tokens: int
    """As the backend counts them."""
    expected: str
    got: str
    correct: bool


class EvalReport:
    """Collects a run's results."""

    def __init__(self, prompts: Sequence[PasskeyPrompt], argv: Sequence[str]):
        self._prompts = prompts
        self._rows: list[Row | None] = [None] * len(prompts)
        self._argv = list(argv)
        self._started = time.perf_counter()
        self.perplexity: float | None = None
        """exp of the mean negative log-likelihood of a token."""
        self.perplexity_tokens = 0
        self.no_perplexity: str | None = None
        """The reason why there is no perplexity."""
        self.stopped: str | None = None
        """The reason why the run ended early."""
        self.metadata: dict[str, Any] = {"model": None, "device": None, "mesh": None, "versions": {}}

    def add_answer(self, index: int, prompt_tokens: int, text: str) -> Row:
        """Grades the answer to prompt number `index`."""
        prompt = self._prompts[index]
        row = Row(prompt.length, prompt.depth, prompt_tokens, prompt.passkey.key, text, prompt.is_answered_by(text))
        self._rows[index] = row
        return row

    def set_perplexity(self, logprobs: Sequence[float]) -> None:
        """Computes the perplexity from the log-probabilities of all predicted tokens, in nats."""
        mean = math.fsum(logprobs) / len(logprobs) if all(map(math.isfinite, logprobs)) else math.nan
        if -_MAX_NATS <= mean <= 0:
            self.perplexity, self.perplexity_tokens = math.exp(-mean), len(logprobs)
        else:
            self.no_perplexity = f"the tokens' mean log-probability is {mean:g}"

    @property
    def rows(self) -> list[Row]:
        """The answered prompts, in their order."""
        return [row for row in self._rows if row is not None]

    @property
    def passkey_accuracy(self) -> float | None:
        """The share of the answered prompts that are answered correctly; None: none is answered yet."""
        return sum(row.correct for row in self.rows) / len(self.rows) if self.rows else None

    def cells(self) -> dict[tuple[int, float], bool | None]:
        """Results by (length, depth): True if the answer was correct, None if there is none yet."""
        return {
            (prompt.length, prompt.depth): None if row is None else row.correct
            for prompt, row in zip(self._prompts, self._rows, strict=True)
        }

    def axes(self) -> tuple[list[int], list[float]]:
        """The lengths and depths of the cells, in ascending order."""
        return sorted({prompt.length for prompt in self._prompts}), sorted({prompt.depth for prompt in self._prompts})

    def summary(self) -> list[str]:
        """The scores, one per line."""
        parts = []
        if self._prompts:
            correct, answered, asked = sum(row.correct for row in self.rows), len(self.rows), len(self._prompts)
            of = f"{correct} of {answered}" + (f"; {asked} asked" if answered < asked else "")
            accuracy = self.passkey_accuracy
            parts.append(f"passkey accuracy {'unknown' if accuracy is None else f'{accuracy:.4f}'} ({of})")
        if self.perplexity is not None:
            parts.append(f"perplexity {self.perplexity:.4f} ({self.perplexity_tokens} tokens)")
        elif self.no_perplexity:
            parts.append(f"no perplexity: {self.no_perplexity}")
        return parts

    def as_dict(self) -> dict[str, Any]:
        """The content of the JSON file."""
        return {
            "passkey_accuracy": self.passkey_accuracy,
            "perplexity": self.perplexity,
            "perplexity_tokens": self.perplexity_tokens,
            "no_perplexity": self.no_perplexity,
            "stopped": self.stopped,
            **self.metadata,
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
        model, mesh = self.metadata["model"], self.metadata["mesh"]
        console.print(escape(f"{model}{f', {mesh}' if mesh else ''}: {', '.join(self.summary())}"), soft_wrap=True)
        if self.stopped:
            console.print(escape(f"not complete: {self.stopped}"), soft_wrap=True)


_MARKS = {True: Text("yes", "green"), False: Text("no", "bold red"), None: Text("-", "dim")}
