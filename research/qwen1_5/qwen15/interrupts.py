"""Keep Ctrl-C for Python: when a graph runs, MindSpore installs a handler that ends the process with SIGTERM.

Held back, SIGINT stays pending; afterwards Python's handler is put back and gets it. The system hands a signal to any
thread that does not hold it back, so every thread has to be started while it is held: MindSpore's are, and so are
NumPy's when this module is imported first.
"""

from __future__ import annotations

import ctypes
import signal
import threading


class held:
    """Hold SIGINT back within `with held():`, in this thread and in those that are started there."""

    def __enter__(self) -> None:
        self._before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def __exit__(self, *failure: object) -> None:
        put_back()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before)


def put_back() -> None:
    """Put Python's handler back where a library has replaced it, which it may do some time after a graph has run; for
    what runs often and holds nothing back."""
    global _installed
    if _current(signal.SIGINT) == _installed:
        return
    handler = signal.getsignal(signal.SIGINT)  # Python's default handler, whatever is installed now
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, handler)
        _installed = _current(signal.SIGINT)


_current = ctypes.pythonapi.PyOS_getsig
_current.restype, _current.argtypes = ctypes.c_void_p, (ctypes.c_int,)
_installed = _current(signal.SIGINT)
"""The address of the handler that Python has installed."""

with held():
    import numpy  # noqa: F401  (its linear algebra library starts threads)
