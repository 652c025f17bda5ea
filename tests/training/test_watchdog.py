"""What watches a run: signals, their deadline, and stalls."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from sst_jax.errors import InputError
from sst_jax.training.watchdog import SIGNALS, StallWatchdog, StopSignals, Watch


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopSignals() as stop:
        assert not stop.now()
        os.kill(os.getpid(), number)
        assert stop.now()
        assert stop.requested == signal.Signals(number).name
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_the_first_interrupt_says_that_it_is_heeded(capsys):
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert capsys.readouterr().err == ""
        os.kill(os.getpid(), signal.SIGINT)
        assert capsys.readouterr().err.startswith("finishing this step, then saving; Ctrl-C again ends at once")


def test_a_second_interrupt_does_not_wait():
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_another_signal_does_not_make_the_first_interrupt_the_second():
    """Of another process of the run, or the scheduler's: Ctrl-C still asks for a save."""
    with StopSignals() as stop:
        stop.requested = "a signal to another process"
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.now()


PROGRAM = """
    import os, signal, sys, time
    from sst_jax.training.watchdog import StopSignals
    with StopSignals(within=float(sys.argv[1])) as stop:
        stop.requested = sys.argv[3] or None
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(float(sys.argv[2]))
    time.sleep(0.5)
    print("ended in good order")
"""


def run(within, needed, requested=""):
    started = time.monotonic()
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(within), str(needed), requested]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ended, time.monotonic() - started


@pytest.mark.parametrize("requested", ["", "a signal to another process"])
def test_past_the_deadline_a_run_ends_and_says_that_nothing_was_saved(requested):
    """Also where another process of the run had been told to stop before."""
    ended, seconds = run(0.3, 30, requested)
    assert ended.returncode == 1
    assert "no save within 0.3 s of SIGTERM" in ended.stderr
    assert seconds < 20


def test_in_time_the_deadline_does_nothing():
    ended, _ = run(0.4, 0.1)
    assert ended.returncode == 0, ended.stderr
    assert "good order" in ended.stdout


def test_a_stall_is_told_once_with_every_stack(tmp_path, capfd):
    stalls = StallWatchdog(tmp_path, 0.2 / 60)
    with stalls.watching():
        time.sleep(0.9)  # one long silence
        assert stalls.file.read_text().count("nothing for") == 1
        stalls.beat()
        time.sleep(0.5)
    assert stalls.file.read_text().count("nothing for") == 2
    assert "test_watchdog.py" in stalls.file.read_text()  # this very line is what the main thread is doing
    assert capfd.readouterr().err.count("no step has finished") == 2


def test_steps_that_come_are_no_stall(tmp_path):
    stalls = StallWatchdog(tmp_path, 0.5 / 60)
    with stalls.watching():
        for _ in range(10):
            time.sleep(0.1)
            stalls.beat()
    assert not stalls.file.exists()
    never = StallWatchdog(tmp_path, 0.0)
    with never.watching():
        time.sleep(0.1)
    assert not never.file.exists()


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize(("field", "flag"), [("stop_within", "--stop-within"), ("stall_minutes", "--stall-minutes")])
def test_bad_flags_are_named(field, flag, value):
    with pytest.raises(InputError, match=flag):
        Watch(**{field: value})
