"""SIGTERM, which schedulers send some seconds before they take a machine away.

Where stopping costs nothing it stops the program at once; inside `put_off` it is only noted, and whoever works there
brings what is in hand to disk and then calls `stop_if_asked`.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

EXIT_CODE = 128 + signal.SIGTERM

_asked = False
_put_off = 0


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt no Exception: what mends errors must not take it for one."""


def listen() -> None:
    """From now on SIGTERM raises Terminated in the main thread, from which this must be called."""
    signal.signal(signal.SIGTERM, _on_sigterm)


def asked() -> bool:
    """Whether SIGTERM has come."""
    return _asked


@contextlib.contextmanager
def put_off() -> Iterator[None]:
    """Inside, SIGTERM is noted and raises nothing, however often it comes."""
    global _put_off
    _put_off += 1
    try:
        yield
    finally:
        _put_off -= 1


def stop_if_asked() -> None:
    """
    Raises:
        Terminated: SIGTERM has come.
    """
    if _asked:
        raise Terminated


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    global _asked
    first, _asked = not _asked, True
    # A launcher passes on what its workers may have got from the scheduler already: the second must not disturb the
    # tidying up after the first.
    if first and not _put_off:
        raise Terminated
