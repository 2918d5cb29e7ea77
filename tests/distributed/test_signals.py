"""Signals reach their action while the main thread is inside of C++ code."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import time

from jax_mla_cp.distributed.signals import SIGNALS, SignalThread
from tests.helpers.processes import environment

BUSY = """
import hashlib, os
from jax_mla_cp.distributed.signals import SignalThread

def act():
    print("acted", flush=True)
    os._exit(7)

with SignalThread(act):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # in C, without the interpreter's lock: no handler of Python's runs
"""


def test_a_busy_main_thread_delays_nothing() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", BUSY], env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 7
        finally:
            process.kill()


def test_the_action_may_be_replaced_and_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    acted: queue.Queue[str] = queue.Queue()
    with SignalThread(lambda: acted.put("first")) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert acted.get(timeout=20) == "first"
        signals.action = lambda: acted.put("second")
        os.kill(os.getpid(), signal.SIGINT)
        assert acted.get(timeout=20) == "second"
    assert [signal.getsignal(number) for number in SIGNALS] == before
