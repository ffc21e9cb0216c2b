"""Signals: recorded at any moment, whatever the process has inherited."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from diffmoe_ds.distributed import signals
from tests.helpers.processes import REPOSITORY, clean_environment

INTERRUPTED = """
import signal, sys
from diffmoe_ds.cli import console
from diffmoe_ds.distributed import signals

class Interrupted(console._Output):
    def write(self, data):
        if b"warning" in bytes(data):
            signal.raise_signal(signal.SIGINT)
        return super().write(data)

console._Output = Interrupted
console.protect()
signals.listen()
print("a warning", file=sys.stderr, flush=True)
print(signals.received())
"""


def run(code: str, **options: object) -> subprocess.CompletedProcess[str]:
    environment = clean_environment()
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240,
        check=False, **options,
    )  # fmt: skip


def test_ctrl_c_while_a_warning_is_printed():
    done = run(INTERRUPTED)
    assert (done.returncode, done.stdout) == (0, "SIGINT\n"), done.stderr
    assert "a warning" in done.stderr and "press Ctrl-C again" in done.stderr


@pytest.mark.parametrize("number", signals.STOP_SIGNALS)
def test_a_signal_that_the_parent_has_blocked_is_received(number):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        done = run(
            "import os, signal\nfrom diffmoe_ds.distributed import signals\nsignals.listen()\n"
            f"os.kill(os.getpid(), {int(number)})\nprint(signals.received())"
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert (done.returncode, done.stdout) == (0, f"{number.name}\n"), done.stderr


def test_listening_restores_what_was_blocked():
    handler = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        with signals.listening():
            os.kill(os.getpid(), signal.SIGUSR1)
            assert signals.received() == "SIGUSR1"
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGUSR1, handler)
