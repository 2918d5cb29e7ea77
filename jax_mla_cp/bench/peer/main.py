"""`bench peer`: makes the target, measures row by row, and reports."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jax_mla_cp.bench.peer.peer_options import PeerOptions, make_parser, parse
from jax_mla_cp.bench.peer.work import Target, TargetFailed, Work
from jax_mla_cp.cli import fail, write_output
from jax_mla_cp.config.errors import ConfigError

_SERVER_VOCABULARY = 10_000


def main(argv: Sequence[str]) -> int:
    """Runs `bench peer`. Exit code 0; 1 if a row failed; 2 for a setting that can't work; 130 after Ctrl-C."""
    options = parse(argv)
    try:
        return _run(options, argv)
    except ConfigError as error:
        fail(error, make_parser())


def _run(options: PeerOptions, argv: Sequence[str]) -> int:
    try:
        target, vocabulary = _target(options)
    except KeyboardInterrupt:
        print("stopped before the first run.", file=sys.stderr)
        return 130
    work = Work(target, options.vocabulary or vocabulary, (options.generate[0], options.generate[1]), options.samples)
    rows: list[dict[str, Any]] = []
    stopped = False
    try:
        _measure(work, options, rows)
    except KeyboardInterrupt:
        stopped = True
    report = {"argv": list(argv), **target.metadata(), "generate": options.generate, "samples": options.samples}
    _show(rows, report["engine"], stopped)
    if options.json is not None:
        text = json.dumps(report | {"stopped": stopped, "rows": rows}, indent=1) + "\n"
        write_output("json", options.json, lambda file: file.write_text(text))
    return 130 if stopped else int(any("error" in row for row in rows))


def _target(options: PeerOptions) -> tuple[Target, int]:
    """The engine, and the vocabulary to draw from if none is given."""
    if options.base_url is not None:
        from jax_mla_cp.bench.peer.server import Server

        server = Server(options.base_url, model=options.served_model_name, timeout=options.timeout)
        return server, _SERVER_VOCABULARY
    from jax_mla_cp.bench.peer.in_process import InProcess

    engine = InProcess(options.launch, max_model_len=options.longest, max_running=options.most)
    return engine, engine.vocabulary


def _measure(work: Work, options: PeerOptions, rows: list[dict[str, Any]]) -> None:
    """Adds the rows. One that fails does not stop the others."""
    measurements: list[tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = [
        (
            {"what": "time to first token", "requests": 1, "context": tokens},
            functools.partial(work.time_to_first_token, tokens),
        )
        for tokens in options.ttft
    ]
    measurements += [
        (
            {"what": "decode step", "requests": requests, "context": context},
            functools.partial(work.decode_step, requests, context),
        )
        for requests, context in options.shapes
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(measurements))
        for facts, measure in measurements:
            progress.update(task, description=f"{facts['what']}, {facts['requests']} x {facts['context']}")
            try:
                rows.append(facts | measure())
            except TargetFailed as error:
                rows.append(facts | {"error": str(error)})
            progress.advance(task)


def _show(rows: Sequence[dict[str, Any]], engine: str, stopped: bool) -> None:
    table = Table(title=engine)
    for title in ("", "requests", "context", "ms", "spread", "tokens/s"):
        table.add_column(title, justify="left" if not title else "right")
    for row in rows:
        numbers = [f"{row[key]:.{digits}f}" if row.get(key) is not None else "" for key, digits in _DIGITS.items()]
        table.add_row(row["what"], str(row["requests"]), str(row["context"]), *numbers)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    for row in rows:
        if "error" in row:
            console.print(f"{row['what']}, {row['requests']} x {row['context']}: {row['error']}", markup=False)
    if stopped:
        console.print("stopped with Ctrl-C: the table holds what was measured until then.")


_DIGITS = {"ms": 2, "spread_ms": 2, "tokens_per_s": 0}
