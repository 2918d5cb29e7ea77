"""A server as two processes answers as one process does; processes that differ end, and say why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.helpers.answer_sheet import Answer, compare, fill, sheets
from tests.helpers.live import wait_for
from tests.helpers.processes import Cluster, cluster, server, url_of

CHUNK, LENGTH = 16, 160
FLAGS = (
    *("--platform", "cpu", "--mesh", "tp=2,cp=2", "--log-level", "debug"),
    *("--page-size", "16", "--kv-pages", "64", "--max-model-len", str(LENGTH)),
    *("--prefill-chunk", str(CHUNK), "--max-running", "4"),
)
"""Few programs: each takes these machines 15 s to compile."""
QUESTIONS = sheets(count=3, tokens=12, chunk=CHUNK, longest=60, at_a_time=2)


@pytest.fixture(scope="module")
def one() -> dict[str, list[Answer]]:
    """Answers of a single process."""
    with server(*FLAGS) as process:
        return fill(url_of(process), QUESTIONS)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, str]]:
    """Two processes with two devices each, which end cleanly."""
    with cluster(tmp_path_factory.mktemp("two"), 2, *FLAGS) as running:
        yield running, running.wait_until_ready()
        running.stop()
        assert "Traceback" not in running.log(0) + running.log(1)


@pytest.fixture(scope="module")
def answers(two: tuple[Cluster, str]) -> dict[str, list[Answer]]:
    return fill(two[1], QUESTIONS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [sheet.name for sheet in QUESTIONS])
def test_two_processes_answer_as_one(kind: str, one: dict[str, list[Answer]], answers: dict[str, list[Answer]]) -> None:
    found = compare(one[kind], answers[kind])
    assert not found.wrong
    assert found.furthest < 1e-4
    assert any(answer.text for answer in answers[kind])


@pytest.mark.slow
def test_the_questions_are_what_they_say(answers: dict[str, list[Answer]]) -> None:
    """The test above is of every kind of step."""
    assert [answer.cached > 0 for answer in answers["prefix reuse"]] == [False, True, True]
    assert all(answer.cached == 0 for answer in answers["chunked prefill"])
    plain, json_text = answers["prefill"][0].text, answers["adjustments"][3].text
    assert re.match(r'\s*\{\s*"x"', json_text) and plain != json_text
    assert answers["prompt log-probabilities"][1].logprobs[0] is None, "a prompt's first token has none"
    assert compare(answers["prefill"], answers["chunked prefill"]).wrong, "negative control: other answers differ"


@pytest.mark.slow
def test_the_log_and_the_status_say_who_is_where(two: tuple[Cluster, str], answers: dict[str, list[Answer]]) -> None:
    running, url = two
    leader, follower = running.log(0), running.log(1)
    places = [rf"process {i} on \S+: 2 x cpu cp={i} tp=0-1" for i in range(2)]
    assert re.search(rf"mesh tp=2,cp=2 over 2 processes: {places[0]} {places[1]}", leader)
    for i, log in enumerate((leader, follower)):
        assert f"process {i} of 2 on " in log and re.search(rf"this is {places[i]}", log)
    assert re.search(r"ready: following process 0 \(\S+\)", follower)
    processes: list[dict[str, Any]] = wait_for(  # the last echo may still be on its way
        lambda: httpx.get(f"{url}/status", timeout=60).json()["processes"],
        lambda processes: processes[0]["step"] == processes[1]["step"],
        60,
    )
    assert [each["process"] for each in processes] == [0, 1]
    assert processes[0]["step"] > 100 and processes[0]["host"] == processes[1]["host"]
    assert processes[1]["heartbeat_age"] < 10


@pytest.mark.slow
def test_clients_that_leave_and_requests_that_are_refused_harm_nothing(
    two: tuple[Cluster, str], answers: dict[str, list[Answer]]
) -> None:
    _, url = two
    with ThreadPoolExecutor(2) as pool:
        body = {"model": "jax-mla-cp-tiny", "prompt": [5] * 30, "max_tokens": 100, "ignore_eos": True}
        left = pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=1)
        refused = httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": LENGTH}, timeout=60)
        assert isinstance(left.exception(60), httpx.ReadTimeout)
    assert refused.status_code == 400
    again = fill(url, QUESTIONS[:1])["prefill"]
    assert not compare(answers["prefill"], again).wrong


def test_another_flag_ends_both_with_one_sentence(tmp_path: Path) -> None:
    with cluster(tmp_path, 2, *FLAGS, own={1: ("--page-size", "32")}) as running:
        assert running.wait(120) == [2, 2]
        sentence = (
            r"error: --page-size: must be the same in all processes: process 1 \(\S+\) has 32, process 0 \(\S+\) has 16\. "
            r"Start all with the same command, version and files\."
        )
        for i in range(2):
            assert len(re.findall(sentence, running.log(i))) == 1, running.log(i)
            assert "Traceback" not in running.log(i) and "this process ends" not in running.log(i)
        assert "reading weights" not in running.log(0) + running.log(1), "nothing was read yet"
