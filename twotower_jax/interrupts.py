"""Work that a signal must not cut in the middle, or that ends in good order when one comes."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

AT_ONCE = 5.0  # seconds after which what does not end is left
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def deferred() -> Iterator[list[int]]:
    """Holds Ctrl-C and its like back until the block is done: threads of a library go on writing after they are cut.

    Gives a list of the signals that arrived, so that a long block can end early.
    """
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals arrive in the main thread alone
        yield arrived
        return
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in ENDING}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in arrived[:1]:
            signal.raise_signal(number)


class Stop:
    """Whether a long job was asked to stop; a second signal stops it at once.

    Args:
      grace: seconds that what is at work has to end; the process ends soon after, whatever it waits for.
      farewell: what is said then.
      listens: whether signals are heard; otherwise they do what they do.

    Attributes:
      asked: whether a signal came.
    """

    def __init__(self, grace: float, farewell: str, listens: bool = True):
        self.asked, self._grace, self._until, self._listens = False, grace, 0.0, listens
        self._end = threading.Timer(grace + AT_ONCE, _end, [farewell])
        self._end.daemon = True
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        if self._listens and threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._heard) for number in ENDING}
        return self

    def _heard(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self._until = True, time.monotonic() + self._grace
        self._end.start()
        print(f"twotower: stopping; rows at work have {self._grace:.0f} s to end", file=sys.stderr)

    @property
    def late(self) -> bool:
        """Whether the rows have had their time."""
        return self.asked and time.monotonic() > self._until

    def __exit__(self, *_: Any) -> None:
        self._end.cancel()
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _end(farewell: str) -> None:
    print(farewell, file=sys.stderr, flush=True)
    os._exit(130)
