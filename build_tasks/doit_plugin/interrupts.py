"""Ctrl-C and SIGTERM end a command also where its main thread already waits for something.

    signal ─► Python's C handler ─► pipe ─► thread ─► SIGURG, which ends a wait of the main thread ─► Python's handler

Python runs handlers in the main thread, between two instructions. A signal that arrives just before the main thread
waits, or that another thread receives, would be handled only after that wait: when the stage has ended that the signal
should end. See `signal.set_wakeup_fd` in Python's documentation.
"""

import functools
import os
import signal
import threading
import time

ENDING = (signal.SIGINT, signal.SIGTERM)
ATTEMPTS = 20  # to wake the main thread; one of them may come too early as well
PAUSE = 0.1  # seconds before each


@functools.cache
def end_waits() -> None:
    """From now on, a signal that ends a command also ends what its main thread waits for. To be called there."""
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        return
    signal.signal(signal.SIGURG, lambda number, frame: None)  # a signal that is ignored ends no wait
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_wake_main_thread, args=(reader,), daemon=True).start()


def _wake_main_thread(reader: int) -> None:
    """Wake the main thread after each signal that ends a command.

    Args:
        reader: The end of a pipe that has a byte for each signal, its number.
    """
    main = threading.main_thread().ident
    assert main is not None
    while number := os.read(reader, 1):
        if number[0] in ENDING:
            for _ in range(ATTEMPTS):
                time.sleep(PAUSE)
                signal.pthread_kill(main, signal.SIGURG)
