from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from siamese_deploy.interrupts import interrupts_held


def test_an_interrupt_waits_for_the_next_safe_point() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held() as let_through:
        let_through()
        signal.raise_signal(signal.SIGINT)
        done.append("work goes on")
        let_through()
        done.append("never")
    assert done == ["work goes on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_not_lost_at_the_end_and_passes_through_nested_blocks() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held() as outer:
        with interrupts_held() as inner:
            signal.raise_signal(signal.SIGINT)
            inner()
            done.append("inner block ended")
        done.append("still in the outer block")
        outer()
    assert done == ["inner block ended", "still in the outer block"]
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)


def test_a_second_signal_ends_the_process_at_once() -> None:
    code = (
        "import signal; from siamese_deploy.interrupts import interrupts_held\n"
        "with interrupts_held():\n"
        "    signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGTERM); print('never')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (143, "")


def test_a_repeated_signal_can_be_left_to_the_first_also_in_nested_blocks() -> None:
    code = (
        "import signal; from siamese_deploy.interrupts import interrupts_held\n"
        "try:\n"
        "    with interrupts_held(second_ends=False) as outer:\n"
        "        with interrupts_held():\n"
        "            signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGTERM)\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "        outer(lambda: print('saved', flush=True))\n"
        "except KeyboardInterrupt: print('never')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "saved\n")  # the last one to arrive


def test_a_forked_worker_ends_on_sigterm_and_leaves_sigint_to_its_parent() -> None:
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 7)):
        with interrupts_held():
            child = os.fork()
            if child == 0:
                signal.raise_signal(number)
                os._exit(7)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status


def test_what_the_caller_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts_held() as let_through:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            let_through()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_use_it() -> None:
    results = []

    def work() -> None:
        with interrupts_held() as let_through:
            let_through()
            results.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == ["done"]
