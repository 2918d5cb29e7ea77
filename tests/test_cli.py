"""The library's errors in a program's flags: fields, mentions in messages, and what stays as it is."""

from __future__ import annotations

import argparse
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jax_mla_cp import cli
from jax_mla_cp.bench import bench_flags
from jax_mla_cp.bench.peer import peer_options
from jax_mla_cp.bench.serve import client_options
from jax_mla_cp.checkpoint import __main__ as checkpoint
from jax_mla_cp.config.errors import ConfigError, check_choice, check_whole
from jax_mla_cp.eval import eval_options
from jax_mla_cp.mesh import MeshShape
from jax_mla_cp.serve import server_flags

SERVE = server_flags.make_parser()


def command(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    return cli._commands(parser)[name]


def test_an_error_is_its_field_and_its_message() -> None:
    error = ConfigError("page_size", "must be a multiple of 64, got 100.")
    assert str(error) == "page_size: must be a multiple of 64, got 100."
    assert (error.field, error.message) == ("page_size", "must be a multiple of 64, got 100.")


IN_FLAGS = [
    (
        "page_size",
        "must be a multiple of 64, got 100. Use page_size=128, or attention='xla'.",
        "--page-size: must be a multiple of 64, got 100. Use --page-size 128, or --attention xla.",
    ),
    (
        "mesh",
        "cp=4 and tp=8 need 32 devices. Use mesh='tp=8'.",
        "--mesh: cp=4 and tp=8 need 32 devices. Use --mesh tp=8.",
    ),
    ("weights", "Use weights='auto'.", "--weights: Use --weights auto."),
    ("memory_fraction", "try memory_fraction=0.9.", "--memory-fraction: try --memory-fraction 0.9."),
    (
        "memory_fraction",
        "a larger `mesh`, a smaller `max_model_len`",
        "--memory-fraction: a larger --mesh, a smaller --max-model-len",
    ),
    ("compile_cache", "compile_cache='/a b'", "--compile-cache: --compile-cache '/a b'"),
    # What is not a parameter of the program stays.
    (
        "config.json",
        "topk_method='greedy' does not use expert groups",
        "config.json: topk_method='greedy' does not use expert groups",
    ),
    ("config.json", "quantization_config.weights='int4'", "config.json: quantization_config.weights='int4'"),
    ("mtp", "load it with mtp=True, `Planner`", "mtp: load it with mtp=True, `Planner`"),
    ("host", "got 'port=3', and it can't be 'page_size=4'", "--host: got 'port=3', and it can't be 'page_size=4'"),
    ("page_size", "a page_size of 4, page_size=4K", "--page-size: a page_size of 4, page_size=4K"),
]


@pytest.mark.parametrize(("field", "message", "want"), IN_FLAGS)
def test_errors_are_told_in_flags(field: str, message: str, want: str) -> None:
    assert cli.in_flags(ConfigError(field, message), SERVE) == want


def test_lists_are_joined_by_commas() -> None:
    error = ConfigError("lengths", "use lengths=(512, 20473).")
    assert cli.in_flags(error, eval_options.make_parser()) == "--lengths: use --lengths 512,20473."


def test_positional_arguments_have_the_names_of_help() -> None:
    parser = checkpoint.make_parser()
    error = ConfigError("model", "/x is not a directory.")
    assert cli.in_flags(error, command(parser, "inspect")) == "DIR: /x is not a directory."
    assert cli.in_flags(error, command(parser, "convert")) == "HF_DIR: /x is not a directory."
    assert cli.in_flags(ConfigError("out", "is `model`."), command(parser, "convert")) == "OUT: is HF_DIR."


def test_only_the_commands_own_flags_count() -> None:
    """`bench scaling` has --meshes, and no --mesh."""
    parser = bench_flags.make_parser()
    error = ConfigError("mesh", "too large. Use mesh='tp=8'.")
    assert cli.in_flags(error, command(parser, "layer")) == "--mesh: too large. Use --mesh tp=8."
    assert cli.in_flags(error, command(parser, "scaling")) == str(error)


ELSEWHERE = ("serve", "peer")
"""Commands of bench with parsers of their own: its entries for them have no flags."""
PARSERS = [
    SERVE,
    eval_options.make_parser(),
    client_options.make_parser(),
    peer_options.make_parser(),
    *(parser for name, parser in cli._commands(bench_flags.make_parser()).items() if name not in ELSEWHERE),
    *cli._commands(checkpoint.make_parser()).values(),
]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog)
def test_every_flag_is_found_by_its_parameters_name(parser: argparse.ArgumentParser) -> None:
    flags = [a for a in parser._actions if a.option_strings and a.dest != "help"]
    assert flags
    for action in flags:
        assert cli.in_flags(ConfigError(action.dest, "no"), parser) == f"{action.option_strings[0]}: no"


@given(
    st.sampled_from([a for a in SERVE._actions if a.option_strings]),
    st.text(st.characters(exclude_characters="'\\", exclude_categories=("C", "Z"))),
)
def test_any_value_can_be_pasted_into_a_shell(action: argparse.Action, value: str) -> None:
    told = cli.in_flags(ConfigError("host", f"use {action.dest}={value!r}"), SERVE)
    assert told.startswith("--host: use ")
    assert shlex.split(told.removeprefix("--host: use ")) == [action.option_strings[0], value]


@given(st.text())
def test_text_without_mentions_stays(text: str) -> None:
    plain = text.replace("=", "").replace("`", "")
    assert cli.in_flags(ConfigError("config.json", plain), SERVE) == f"config.json: {plain}"


def test_fail_ends_with_code_2_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.fail(ConfigError("port", "taken. Use port=8001."), SERVE)
    assert capsys.readouterr().err == "error: --port: taken. Use --port 8001.\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--dtype", "float23"],
            "--dtype: must be one of auto | float32 | bfloat16, got 'float23'. Did you mean float32?",
        ),
        (
            ["--mesh", "tp=8,cp"],
            "--mesh: 'cp' is not AXIS=SIZE with AXIS one of tp, cp, dp, got 'tp=8,cp'. Use e.g. --mesh tp=8,cp=4.",
        ),
        (["--page-size", "x=page_size=3"], "--page-size: must be a whole number, got 'x=page_size=3'."),
    ],
)
def test_values_that_argparse_refuses(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        SERVE.parse_args(flags)
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    "parse",
    [
        SERVE.parse_args,
        eval_options.make_parser().parse_args,
        lambda flags: bench_flags.make_parser().parse_args(["attention", *flags]),
    ],
    ids=["serve", "eval", "bench"],
)
def test_gpu_means_cuda(parse: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert callable(parse)
    assert parse(["--platform", "gpu"]).platform == parse(["--platform", "cuda"]).platform == "cuda"
    assert parse(["--platform", "cpu"]).platform == "cpu"
    with pytest.raises(SystemExit, match="2"):
        parse(["--platform", "tpu"])
    assert "--platform: must be one of " in capsys.readouterr().err


def test_values() -> None:
    assert cli.mesh("tp=8,cp=4") == MeshShape(tp=8, cp=4)
    assert cli.choice("a", "b", c="a")("c") == "a"


def test_checks() -> None:
    check_choice("form", "auto", ("auto", "absorbed"))
    with pytest.raises(
        ConfigError, match=r"form: must be one of auto \| absorbed, got 'absorbd'\. Did you mean absorbed\?"
    ):
        check_choice("form", "absorbd", ("auto", "absorbed"))
    check_whole("port", 0, 0, 65535)
    for bad in (-1, 65536, 1.0, True, None, "1"):
        with pytest.raises(ConfigError, match="port: must be a whole number from 0 to 65535, got"):
            check_whole("port", bad, 0, 65535)
