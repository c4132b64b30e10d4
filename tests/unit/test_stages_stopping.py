"""SIGTERM: at once where nothing was begun, behind what was begun, at once when it comes twice."""

import os
import signal
import subprocess
import sys

import pytest

from stages.stopping import Stop, Terminated, stop_on_sigterm


def test_a_stop_is_at_once_or_behind_what_was_begun() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), stop_on_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
    done = []

    def finish_what_was_begun() -> None:
        with stop_on_sigterm() as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(stop.requested)

    with pytest.raises(Terminated):
        finish_what_was_begun()
    assert done == [True]


def test_what_was_not_begun_is_not_begun() -> None:
    stop = Stop()
    stop.requested = True
    with pytest.raises(Terminated), stop.deferred():
        raise AssertionError


def test_an_error_is_not_hidden_by_a_stop() -> None:
    stop = Stop()

    def fail() -> None:
        with stop.deferred():
            stop.request()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


def test_the_second_one_ends_the_process() -> None:
    code = (
        "import os, signal\nfrom stages.stopping import stop_on_sigterm\n"
        "with stop_on_sigterm() as stop, stop.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print(stop.requested, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print('never', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stdout == "True\n"
    assert done.returncode == -signal.SIGTERM
