"""The numbers in which `make soak` differs from `make test`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    requests: int
    """Mixed requests, of which a fifth is cancelled and a tenth invalid."""
    longest: int
    """Tokens of the longest of their prompts."""
    at_a_time: int
    mutated: int
    """Bodies changed byte by byte, over raw sockets."""
    examples: int
    """Generated requests per operation of the OpenAPI."""
    repeats: int
    """Tokens of a prompt with a shared prefix."""
    prefix: int
    """Its tokens."""
    interrupting: int
    """Tokens of the prompt that is prefilled beside running requests."""
    pressing: int
    """Requests that do not fit the pages together."""
    rounds: int
    """Rounds of all failures of a server of two processes; 0: a few of them, once."""
    questions: int
    """Questions of each kind that a server of several processes answers as one process does; 0: tests/distributed asks enough."""
    answer: int
    """Tokens of each answer."""


SMALL = Sizes(
    requests=40,
    longest=400,
    at_a_time=16,
    mutated=150,
    examples=10,
    repeats=5,
    prefix=640,
    interrupting=2048,
    pressing=6,
    rounds=0,
    questions=0,
    answer=0,
)
FULL = Sizes(
    requests=1000,
    longest=4000,
    at_a_time=64,
    mutated=9000,
    examples=300,
    repeats=20,
    prefix=3000,
    interrupting=8192,
    pressing=24,
    rounds=20,
    questions=20,
    answer=64,
)
