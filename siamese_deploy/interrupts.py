"""Ctrl-C and SIGTERM between two pieces of work instead of in the middle of one.

Python raises for a signal wherever the main thread happens to be. Inside a lock of a thread pool, a queue or a data
loader that leaves the lock held, and the shutdown that follows waits for it for ever.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_held() -> Iterator[Callable[..., None]]:
    """Within the block a first SIGINT or SIGTERM only takes effect when the yielded function is called, or at the end.

    It then does what it would have done outside (raise KeyboardInterrupt, say), after calling the argument of the
    yielded function, if there is one: the place to save. A second signal ends the process at once.
    Outside the main thread, where Python delivers no signals, nothing is held.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda _save=None: None
        return
    process = os.getpid()
    arrived: list[int] = []

    def note(number: int, _frame: object) -> None:
        if os.getpid() != process:  # a forked worker: its parent ends it, by SIGTERM if need be
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if arrived:
            os._exit(128 + number)
        arrived.append(number)

    # A signal that the caller had ignored (`nohup`, a background job of a script) stays ignored.
    before: dict[signal.Signals, Any] = {
        number: signal.signal(number, note) for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
    }

    def let_through(save: Callable[[], object] | None = None) -> None:
        if arrived:
            if save:
                save()
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.raise_signal(arrived.pop())

    try:
        yield let_through
        let_through()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
