"""A forked process that is killed while it works."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable


def lines_of_killed_child(work: Callable[[int], object], after_s: float) -> list[str]:
    """Run `work` in a forked child, kill it `after_s` after its first line, and return all lines it wrote.

    `work` gets the file descriptor to write to.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(writing)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as lines:
        first = lines.readline()  # it has begun
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        output = first + lines.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    return output.decode().splitlines()
