"""The settings of limits, access and logs; the flags of the model are tried in test_main.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_mla_cp.serve.server_options import ServerOptions, parse


def test_the_defaults_are_safe() -> None:
    config = parse([])
    assert config == ServerOptions()
    assert config.host == "127.0.0.1" and not config.cors_origins and not config.log_requests
    assert config.max_queued == 1024 and config.watchdog_seconds == 600


def test_several_processes_notice_a_stuck_step_sooner() -> None:
    cluster = {"coordinator": "10.0.0.1:8476", "num_processes": 2, "process_id": 0}
    assert ServerOptions(**cluster).watchdog_seconds == 60  # type: ignore[arg-type]
    assert ServerOptions(**cluster, watchdog=5.0).watchdog_seconds == 5  # type: ignore[arg-type]
    assert ServerOptions(**cluster, watchdog=None).watchdog_seconds is None  # type: ignore[arg-type]


def test_every_setting_of_access_limits_and_logs() -> None:
    config = parse(
        [
            "--max-queued",
            "5",
            "--queue-timeout",
            "2.5",
            "--request-timeout",
            "off",
            "--watchdog",
            "off",
            "--drain-timeout",
            "0",
            "--max-body-mb",
            "2",
            "--api-key-file",
            "keys",
            "--ssl-certfile",
            "c.pem",
            "--ssl-keyfile",
            "k.pem",
            "--ssl-keyfile-password-file",
            "p",
            "--cors-origins",
            "https://a.example,http://localhost:3000",
            "--log-format",
            "json",
            "--log-requests",
        ]
    )
    assert (config.max_queued, config.queue_timeout, config.request_timeout, config.watchdog) == (5, 2.5, None, None)
    assert (config.drain_timeout, config.max_body_mb, config.api_key_file) == (0, 2, Path("keys"))
    assert config.cors_origins == ("https://a.example", "http://localhost:3000")
    assert config.log_format == "json" and config.log_requests


BAD = [
    ("--max-queued 0", "--max-queued: must be a whole number from 1"),
    ("--max-body-mb 2000", "--max-body-mb: must be a whole number from 1 to 1024"),
    ("--queue-timeout 0", "--queue-timeout: must be seconds from 0.001"),
    ("--request-timeout nan", "--request-timeout: must be seconds"),
    ("--request-timeout inf", "a week"),
    ("--watchdog soon", "--watchdog: must be a number, got 'soon'"),
    ("--drain-timeout -1", "--drain-timeout: must be seconds from 0"),
    ("--drain-timeout off", "--drain-timeout: must be a number, got 'off'"),
    ("--cors-origins https://a.example/path", "--cors-origins: must be origins like"),
    ("--cors-origins a.example", "got 'a.example'"),
    ("--cors-origins *,https://a.example", "stands alone"),
    ("--ssl-keyfile key.pem", "Add --ssl-certfile"),
    ("--log-format xml", "--log-format: must be one of text | json"),
    ("--api-key secret", "--api-key: no such flag. Did you mean --api-key-file?"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[flags for flags, _ in BAD])
def test_settings_that_cant_be(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(flags.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
