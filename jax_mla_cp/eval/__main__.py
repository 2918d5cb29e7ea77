"""`python -m jax_mla_cp.eval`: passkey retrieval and perplexity. See `--help`."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence

from jax_mla_cp.version import program_imports

with program_imports():
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from jax_mla_cp.config.errors import ConfigError
    from jax_mla_cp.default_model import DIRECTORY
    from jax_mla_cp.default_model.heldout import heldout_text
    from jax_mla_cp.distributed.exit import ending_program, exit_now
    from jax_mla_cp.eval.backend import Backend, BackendError, PromptLogprobsUnsupported
    from jax_mla_cp.eval.corpus import Corpus, PasskeyPrompt, even_depths
    from jax_mla_cp.eval.eval_options import EvalOptions, make_parser, parse
    from jax_mla_cp.eval.heatmap import draw_heatmap
    from jax_mla_cp.eval.in_process import InProcessBackend
    from jax_mla_cp.eval.report import EvalReport
    from jax_mla_cp.launch import config_and_tokenizer, detect
    from jax_mla_cp.tokenizer import Tokenizer, require_tokenizer

_ANSWER_TOKENS = 7
"""A space, five digits and one more character, should each be a token of its own: a sixth digit makes the number wrong."""
_UNKNOWN = 2**31
"""Stands for the vocabulary size and the maximum length of a server's model."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the evaluation. Exit code 0; 1 if the model or the server failed; 2 for a setting that can't work; 130 after Ctrl-C."""
    options = parse(argv)
    with ending_program(options.launch, make_parser()):
        try:
            options = dataclasses.replace(options, launch=detect(options.launch))
            code = _run(options, sys.argv[1:] if argv is None else argv)
        except KeyboardInterrupt:
            print("\nstopped.", file=sys.stderr)
            code = 130
    if options.launch.is_cluster:
        exit_now(code)
    return code


def _run(options: EvalOptions, argv: Sequence[str]) -> int:
    # Settings that can't work are refused before anything is loaded.
    longest, tokenizer = _limits(options)
    corpus = Corpus(tokenizer, _read(options))
    prompts = [
        corpus.prompt(length, depth, options.seed)
        for length in sorted(options.lengths)
        for depth in even_depths(options.depths)
    ]
    windows = corpus.windows(options.perplexity_tokens, longest)
    max_model_len = max([*(length + _ANSWER_TOKENS for length in options.lengths), *map(len, windows)])
    backend = _backend(options, tokenizer, max_model_len)
    if isinstance(backend, InProcessBackend):
        backend.follow()
    report = EvalReport(prompts, argv)
    report.metadata = {
        **backend.metadata(),
        "text": str(options.text or "held-out documentation"),
        "seed": options.seed,
    }
    code = 0
    try:
        _measure(backend, prompts, windows, report)
    except KeyboardInterrupt:
        report.stopped, code = "stopped with Ctrl-C", 130
    except BackendError as error:
        report.stopped, code = str(error), 1
    report.show(Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    if options.json is not None:
        report.save(options.json)
    if options.picture is not None:
        draw_heatmap(report, options.picture)
    if isinstance(backend, InProcessBackend):
        code = backend.close() or code
    return code


def _limits(options: EvalOptions) -> tuple[int, Tokenizer]:
    """The maximum number of tokens in a window, and the tokenizer.

    Raises:
      ConfigError: a prompt would be longer than the model can read, or there is no tokenizer.
    """
    if options.base_url is not None:
        return _UNKNOWN, require_tokenizer(Tokenizer.from_dir(options.tokenizer or DIRECTORY, _UNKNOWN))
    config, found = config_and_tokenizer(options.launch.model)
    tokenizer = require_tokenizer(found)
    most = config.max_position - _ANSWER_TOKENS
    if (longest := max(options.lengths, default=0)) > most:
        raise ConfigError(
            "lengths",
            f"must be at most {most}, got {longest}: the model has {config.max_position} positions, of which the answer takes "
            f"{_ANSWER_TOKENS}. Use lengths of at most {most}, e.g. lengths=(512, {most}).",
        )
    return config.max_position, tokenizer


def _read(options: EvalOptions) -> str:
    if options.text is None:
        return heldout_text()
    try:
        return options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("text", f"{options.text} can't be read as UTF-8 text: {error}") from error


def _backend(options: EvalOptions, tokenizer: Tokenizer, max_model_len: int) -> Backend:
    if options.base_url is not None:
        if importlib.util.find_spec("aiohttp") is None:
            raise ConfigError("base_url", "aiohttp is missing. Install it with pip install 'jax-mla-cp[eval]'.")
        from jax_mla_cp.eval.server import ServerBackend

        return ServerBackend(options.base_url, tokenizer, model=options.served_model_name, timeout=options.timeout)
    return InProcessBackend(options.launch, max_model_len, name=options.served_model_name)


def _measure(
    backend: Backend, prompts: Sequence[PasskeyPrompt], windows: Sequence[Sequence[int]], report: EvalReport
) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        if windows:
            task = progress.add_task("perplexity", total=len(windows))
            try:
                report.set_perplexity(backend.prompt_logprobs(windows, lambda: progress.advance(task)))
            except PromptLogprobsUnsupported as error:
                report.no_perplexity = str(error)
        if prompts:
            task = progress.add_task("passkeys", total=len(prompts))

            def on_done(index: int, prompt_tokens: int, text: str) -> None:
                row = report.add_answer(index, prompt_tokens, text)
                state = f"passkeys: {row.length} tokens, depth {row.depth:.2f}"
                progress.update(task, advance=1, description=state)

            backend.generate(prompts, _ANSWER_TOKENS, on_done)


if __name__ == "__main__":
    raise SystemExit(main())
