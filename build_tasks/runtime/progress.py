"""Progress messages from the process of a stage to the reporter."""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

MIN_INTERVAL = 0.1  # seconds between two progress messages about the same thing

_connection: "Connection | None" = None  # to doit, in the process of a stage
_lock = threading.Lock()  # a library may report from several threads
_last_sent: tuple[str, float] = "", 0.0  # what the last message was about, and when it was sent


class Progress(NamedTuple):
    """The progress of a stage.

    Attributes:
        what: The file or the phase that it works on.
        done: The finished part, in `unit`.
        total: The whole, in `unit`; None if it is not known.
        unit: "B" for bytes, or another word, or "".
    """

    what: str
    done: float = 0
    total: float | None = None
    unit: str = ""


Message = Progress | str  # or a line for the terminal


def ignore(task: str, message: Message) -> None:
    """The listener of messages before there is a reporter: does nothing."""


def ignore_line(line: str) -> None:
    """The listener of lines before there is a reporter: does nothing."""


listener: Callable[[str], None] = ignore_line  # takes the lines that doit's own process emits


def emit(message: Message) -> None:
    """Send a message from a stage's process to doit. Progress that follows its like within MIN_INTERVAL is dropped.

    In doit's own process, a line goes to `listener`.
    """
    global _last_sent
    if _connection is None and isinstance(message, str):
        listener(message)
    with _lock, contextlib.suppress(OSError):  # doit may have ended; this process will end, too
        now = time.monotonic()
        what, sent = _last_sent
        if _connection is None:
            return
        if isinstance(message, Progress):
            if message.what == what and now - sent < MIN_INTERVAL:
                return
            _last_sent = message.what, now
        _connection.send(("message", message))


def connect(connection: "Connection") -> None:
    """From now on send the messages of this process, which runs a stage, over this connection to doit."""
    global _connection
    _connection = connection
