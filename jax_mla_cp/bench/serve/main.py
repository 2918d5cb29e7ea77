"""`bench serve`: prepares, plans, sends and reports one run."""

from __future__ import annotations

import asyncio
import collections
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jax_mla_cp.bench.serve.client_options import ClientOptions, make_parser, parse
from jax_mla_cp.cli import fail, write_output
from jax_mla_cp.config.errors import ConfigError
from jax_mla_cp.default_model.heldout import heldout_text

_POOL_CHARACTERS = 200_000
"""Length of the text that prompts are cut from: some 50K tokens, which any server tokenizes quickly."""


def main(argv: Sequence[str]) -> int:
    """Runs `bench serve`. Exit code 0; 1 if nothing succeeded; 2 for a setting that can't work; 130 after Ctrl-C."""
    options = parse(argv)
    try:
        return _run(options, argv)
    except ConfigError as error:
        fail(error, make_parser())


def _run(options: ClientOptions, argv: Sequence[str]) -> int:
    from jax_mla_cp.bench.serve.load_generator import LoadGenerator
    from jax_mla_cp.bench.serve.load_report import LoadReport, versions
    from jax_mla_cp.bench.serve.request_result import RequestResult
    from jax_mla_cp.bench.serve.workload import plan

    generator = LoadGenerator(options.base_url, model=options.model, headers=options.headers, timeout=options.timeout)
    try:
        pool, server = asyncio.run(generator.prepare(heldout_text()[:_POOL_CHARACTERS]))
    except KeyboardInterrupt:
        print("stopped before the first request.", file=sys.stderr)
        return 130
    planned = plan(
        pool,
        requests=options.requests,
        rate=options.rate,
        burstiness=options.burstiness,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
        shared_prefix=options.shared_prefix,
        seed=options.seed,
    )
    results = [RequestResult(each) for each in planned]
    stopped = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:
        task = progress.add_task("requests", total=len(results))
        failures: collections.Counter[str] = collections.Counter()

        def on_done(result: RequestResult) -> None:
            failures.update([result.error] if result.error else [])
            failed = ", ".join(f"{n} {kind}" for kind, n in failures.most_common())
            progress.update(task, advance=1, description=f"requests ({failed})" if failed else "requests")

        try:
            asyncio.run(generator.run(results, options.concurrency, on_done))
        except KeyboardInterrupt:
            stopped = True
    metadata = {
        "model": generator.model,
        "server": generator.url,
        "versions": versions(server),
        "argv": list(argv),
        "prompts": "words" if isinstance(pool[0], str) else "token ids",
    }
    report = LoadReport(results, options.goodput, metadata, stopped)
    report.show(Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    if options.json is not None:
        write_output("json", options.json, report.save)
    if options.picture is not None:
        from jax_mla_cp.bench.serve.load_plot import draw_load

        write_output("picture", options.picture, lambda path: draw_load(report, path))
    return 130 if stopped else int(not report.succeeded)
