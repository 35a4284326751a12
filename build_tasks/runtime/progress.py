"""Progress messages from the process of a stage to the reporter."""

import contextlib
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

MIN_INTERVAL = 0.1  # seconds between two messages on progress

_connection: "Connection | None" = None  # to doit, in the process of a stage
_lock = threading.Lock()  # a library may report from several threads
_last_sent = 0.0


class Progress(NamedTuple):
    """How far a stage is.

    what: the file, the phase.
    done, total: of it, in `unit`, which is "B" for bytes; no total where it is not known.
    """

    what: str
    done: float = 0
    total: float | None = None
    unit: str = ""


Message = Progress | str  # a line, where it is worth one


def ignore(task: str, message: Message) -> None:
    """Who listens before there is a reporter."""


def emit(message: Message) -> None:
    """In a stage's process: let whoever is watching know. Of what comes thick and fast, some is passed over."""
    global _last_sent
    with _lock, contextlib.suppress(OSError):  # doit is gone, and this process will be
        now = time.monotonic()
        if _connection is None or (isinstance(message, Progress) and now - _last_sent < MIN_INTERVAL):
            return
        _last_sent = now
        _connection.send(("message", message))


def connect(connection: "Connection") -> None:
    """Send the messages of this process, which runs a stage, over this connection to doit."""
    global _connection
    _connection = connection
