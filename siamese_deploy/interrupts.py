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


class Interrupts:
    """Signals that wait; calling it lets them through."""

    def __init__(self) -> None:
        self.arrived: int | None = None
        """Number of the signal that waits."""
        # A signal that the caller had ignored (`nohup`, a background job of a script) stays ignored.
        self.handlers: dict[signal.Signals, Any] = {
            number: signal.getsignal(number) for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
        }

    def __call__(self, save: Callable[[], object] | None = None) -> None:
        """Where a signal waits: call `save`, then do what the signal would have done before the block."""
        if self.arrived is not None:
            if save:
                save()
            self.restore()
            number, self.arrived = self.arrived, None
            signal.raise_signal(number)

    def restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


_second_ends = [True]
"""Of the blocks that are open, the innermost last."""


@contextmanager
def interrupts_held(*, second_ends: bool | None = None) -> Iterator[Interrupts]:
    """Within the block a first SIGINT or SIGTERM only takes effect when the yielded object is called, or at the end.

    It then does what it would have done outside (raise KeyboardInterrupt, say), after calling the argument of the
    yielded object, if there is one: the place to save. A second signal ends the process at once, unless `second_ends`
    is False: for processes whose parent passes on the signal that they got already. None: as in the enclosing block.
    Outside the main thread, where Python delivers no signals, nothing is held.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    process = os.getpid()
    ends = _second_ends[-1] if second_ends is None else second_ends
    _second_ends.append(ends)

    def note(number: int, _frame: object) -> None:
        if os.getpid() != process:  # a forked worker: its parent ends it, by SIGTERM if need be
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if interrupts.arrived is not None and ends:
            os._exit(128 + number)
        interrupts.arrived = number

    for number in interrupts.handlers:
        signal.signal(number, note)
    try:
        yield interrupts
        interrupts()
    finally:
        _second_ends.pop()
        interrupts.restore()
