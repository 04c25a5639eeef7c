"""Locks of files, by which processes exclude one another."""

import time
from contextlib import suppress

_LOOK_SECONDS = 0.05


def wait_for_lock(handle: int, seconds: float) -> bool:
    """Takes an open file's lock. The system takes it back from a process that dies.

    Args:
        handle: the file's.
        seconds: how long to wait for another process that has it.

    Returns:
        Whether it is had.

    Raises:
        ImportError: the system has no such locks.
    """
    import fcntl  # not on every system

    until = time.monotonic() + seconds
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(_LOOK_SECONDS)
