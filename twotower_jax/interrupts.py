"""Work that a signal must not cut in the middle."""

import contextlib
import signal
import threading
from collections.abc import Iterator

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
