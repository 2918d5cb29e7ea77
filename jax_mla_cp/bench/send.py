"""Time of sending a step to the other processes, on process 0."""

from __future__ import annotations

import dataclasses
import statistics
import time

from jax_mla_cp.distributed.leader import Leader
from jax_mla_cp.distributed.step_message import StepMessage, encode
from jax_mla_cp.step.inputs import StepInputs

PROGRAM = "0123456789abcdef"
"""Stands for the hash of the step's program."""
_STEP_SECONDS = 0.005
"""Time between steps, in which a server's devices would work: the followers echo, and processors go idle."""
_STEPS = 200
_ECHO_SECONDS = 30.0


@dataclasses.dataclass(frozen=True)
class SendTime:
    """Medians, in seconds of process 0."""

    send: float
    """Making, encoding and sending a step's message, on the thread that steps."""
    echo: float
    """Processor time of the threads that handle the echoes, while the thread that steps waits for the devices."""


def time_sends(leader: Leader, inputs: StepInputs, steps: int = _STEPS) -> SendTime:
    """Sends the same step again and again, each after all processes have echoed the one before.

    Raises:
      ClusterFailed, RuntimeError: a process is lost, or does not echo.
    """
    sent, echoed, idle = [], [], []
    lost: list[str] = []
    leader.on_failure = lambda reason, code: lost.append(reason)
    for _ in range(steps):
        began = time.perf_counter()
        with leader.step(lambda number: StepMessage(number, PROGRAM, inputs), first_run=False):
            pass
        sent.append(time.perf_counter() - began)
        echoed.append(_wait_for_echoes(leader, lost))
        idle.append(_wait_for_echoes(leader, lost))  # all have come: what waiting alone costs
    return SendTime(statistics.median(sent), max(0.0, statistics.median(echoed) - statistics.median(idle)))


def message_bytes(inputs: StepInputs) -> int:
    """Length of a step's message."""
    return len(encode(StepMessage(1, PROGRAM, inputs)))


def _wait_for_echoes(leader: Leader, lost: list[str]) -> float:
    """Returns the processor time that this process has spent until all have echoed. `lost`: why the cluster ends."""
    began, until = time.process_time(), time.monotonic() + _ECHO_SECONDS
    while time.monotonic() < until:
        time.sleep(_STEP_SECONDS)
        spent = time.process_time() - began
        first, *others = leader.processes
        if all(other.step == first.step for other in others):
            return spent
        if lost:
            raise RuntimeError(lost[0])
    raise RuntimeError(f"a process has not echoed a step within {_ECHO_SECONDS:g} s.")
