"""Compile progress: what is counted while programs are compiled, one at a time and in parallel."""

from __future__ import annotations

import pytest

from jax_mla_cp.step.compile_progress import CompileTracker


def test_one_at_a_time() -> None:
    tracker = CompileTracker(7)
    assert tracker.progress is None
    for done in range(2):
        with tracker.compiling(512) as started:
            now = tracker.progress
            assert now == started and (now.done, now.total, now.tokens) == (done, 7, 512)
            assert str(now) == f"compiling {done + 1} of 7 programs: 512 tokens per step"
        assert tracker.progress is None


def test_in_parallel_each_has_its_number_and_the_first_is_shown() -> None:
    tracker = CompileTracker(7)
    with tracker.compiling(16) as first:
        with tracker.compiling(32) as second:
            assert (first.done, second.done) == (0, 1)
            assert tracker.progress == first
        now = tracker.progress
        assert now is not None and (now.done, now.tokens, now.since) == (1, 16, first.since)


def test_a_failed_compilation_does_not_count() -> None:
    tracker = CompileTracker(2)
    with pytest.raises(ZeroDivisionError), tracker.compiling(16):
        raise ZeroDivisionError
    assert tracker.progress is None
    with tracker.compiling(16) as again:
        assert again.done == 0
