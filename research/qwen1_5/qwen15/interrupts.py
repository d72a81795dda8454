"""Keep Ctrl-C for Python: when a graph runs, MindSpore installs a handler that ends the process with SIGTERM.

Held back, SIGINT stays pending; afterwards Python's handler is put back and gets it. The system hands a signal to any
thread that does not hold it back, so every thread has to be started while it is held: MindSpore's are, and so are
NumPy's when this module is imported first.
"""

from __future__ import annotations

import signal
import threading


class held:
    """Hold SIGINT back within `with held():`, in this thread and in those that are started there."""

    def __enter__(self) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def __exit__(self, *failure: object) -> None:
        handler = signal.getsignal(signal.SIGINT)  # Python's default handler, whatever is installed now
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


with held():
    import numpy  # noqa: F401  (its linear algebra library starts threads)
