"""Signals that end a command: at once, or between two steps of a training.

INT (Ctrl-C), TERM (what stops services) and HUP (the terminal was closed) end with exit codes 130,
143 and 129.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

from regraft.errors import RegraftError

ENDING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
# Launchers pass one Ctrl-C on that the terminal has given to all; a person needs longer. Assumed.
SAME_S = 0.2


class Ended(RegraftError):
    """A signal ended the command at once."""

    code = "stopped"

    def __init__(self, number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}",
            hint="a training goes on with `regraft resume RUN` from where it was last saved",
        )
        self.exit_code = 128 + number  # type: ignore[misc]


class Noted:
    """Signals that came while a training was under way.

    The first is noted, for the loop to end between two steps. The second ends at once, but for a
    write, which is finished first. The third ends the process: what was committed stays committed.
    """

    def __init__(self) -> None:
        self.caught: list[int] = []
        self._last = 0.0
        self._is_writing = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        now, before = monotonic(), self._last
        self._last = now
        if self.caught and now - before < SAME_S:
            return
        self.caught.append(number)
        if len(self.caught) > 2:
            os._exit(128 + number)
        if len(self.caught) == 2 and not self._is_writing:
            raise Ended(number)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Finishes the block before a second signal ends anything."""
        self._is_writing = True
        try:
            yield
        finally:
            self._is_writing = False
        if len(self.caught) > 1:
            raise Ended(self.caught[1])


@contextmanager
def noted() -> Iterator[Noted]:
    """Notes signals in the block; before and after it they act as they did."""
    signals = Noted()
    with _handled(ENDING, signals):
        yield signals


@contextmanager
def raised() -> Iterator[None]:
    """Lets TERM and HUP end the block with an error, as INT does: what it began is tidied up."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise Ended(number)

    with _handled([number for number in ENDING if number != signal.SIGINT], end):
        yield


@contextmanager
def _handled(numbers: list[int], handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python allows no other
        yield
        return
    before = {}
    for number in numbers:
        if (old := signal.getsignal(number)) is not signal.SIG_IGN:  # as under `nohup`
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
