"""No process of a sweep outlives the sweep, whatever ended it."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def end_with_parent() -> None:
    """For a new worker: from here on it ends when the process that asked for it does, `kill -9` included.

    On Linux the kernel sees to it, even where the worker is stuck: a worker's parent there is the fork server, which ends
    at once with the process that began it. Anywhere, a thread waits for that process.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None, "only workers have a parent"
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
