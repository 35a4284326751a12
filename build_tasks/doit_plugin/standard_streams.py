"""Standard streams that never end a command, and one line for an early Ctrl-C.

    print, reporter, doit ─► sys.stdout ─► a line that is wider than the terminal is wrapped between words
                                 └─► a character that it cannot encode becomes another one
                                     └─► RobustFile ─► the reader, terminal or file; nothing once that has failed

doit_model_repository.py calls `protect` before doit creates one of its commands.
"""

import codecs
import contextlib
import errno
import functools
import io
import os
import select
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from build_tasks.text_table import terminal_width, wrap

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

REPLACED = "build_tasks.replaced"  # the name of `replace_characters` among the handlers of codecs
# What stands for the marks of this project in an encoding without them. All other characters are escaped.
SUBSTITUTES = {"✓": "+", "✗": "x", "–": "-", "─": "-", "…": "...", "→": "->", "×": "x"}
STREAM_NAMES = {1: "standard output", 2: "standard error"}


@functools.cache
def protect() -> None:
    """Replace the standard streams by ones that do not raise, and end the process with one line at a signal."""
    codecs.register_error(REPLACED, replace_characters)
    if os.name == "posix":
        _open_closed_descriptors()
        if sys.stdin is None:
            sys.stdin = open(0, closefd=False)  # noqa: SIM115  # stays open
        if sys.stdout is sys.__stdout__:
            sys.stdout = _robust(sys.stdout, 1)
        if sys.stderr is sys.__stderr__:
            sys.stderr = _robust(sys.stderr, 2)
    elif isinstance(sys.stdout, io.TextIOWrapper):  # Windows has its own class for consoles
        sys.stdout.reconfigure(errors=REPLACED)
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)


class RobustFile(io.FileIO):
    """A file for output. When a write fails, it discards that output and all that follows.

    The reader may have gone away (`doit | head -1`), the disk may be full, or the terminal may be closed.
    """

    def write(self, data: "ReadableBuffer", /) -> int:
        try:
            while (count := super().write(data)) is None:  # the descriptor does not block, and its reader is slow
                select.select([], [self], [])
            return count
        except OSError as error:
            if error.errno != errno.EPIPE and self.fileno() != 2:
                name = STREAM_NAMES.get(self.fileno(), self.name)
                with contextlib.suppress(OSError):
                    os.write(2, f"{name}: {error.strerror}; the rest of it is lost\n".encode())
            # Also for the processes that are started from now on.
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return memoryview(data).nbytes


class TerminalText(io.TextIOWrapper):
    """The text stream of a terminal. It wraps lines between words, except those that control the cursor."""

    wraps = True

    def write(self, text: str, /) -> int:
        if self.wraps and "\x1b" not in text and len(text) > (width := terminal_width(self) or len(text)):
            super().write(wrap(text, width))
            return len(text)
        return super().write(text)


def keep_lines_whole() -> None:
    """From now on, write lines of any length as they are: those of JSON, Markdown or a script may be copied."""
    if isinstance(sys.stdout, TerminalText):
        sys.stdout.wraps = False


def open_output(path: str) -> TextIO:
    """Open a file for the output of a run, as `doit --output-file` does."""
    return io.TextIOWrapper(io.BufferedWriter(RobustFile(path, "w")), "utf-8")


def replace_characters(error: UnicodeError) -> tuple[str, int]:
    """Return what is written instead of characters that cannot be encoded, and where the text goes on.

    This is a handler of errors; see the documentation of `codecs`.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    escaped = (SUBSTITUTES.get(char) or char.encode("ascii", "backslashreplace").decode() for char in characters)
    return "".join(escaped), error.end


def _open_closed_descriptors() -> None:
    """Open the descriptors 0, 1 and 2, if doit was started with closed ones (`doit >&-`).

    Otherwise the next files that are opened get these numbers, and what a child process prints gets into them.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _robust(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream that writes to a descriptor of the process in the encoding of its stream, which may be None."""
    return (TerminalText if stream and stream.isatty() else io.TextIOWrapper)(
        io.BufferedWriter(RobustFile(descriptor, "w", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors=REPLACED,
        line_buffering=bool(descriptor == 2 or (stream and stream.isatty())),
        write_through=isinstance(stream, io.TextIOWrapper) and stream.write_through,
    )


def _end(number: int, frame: FrameType | None) -> None:
    """Handle a signal before a run begins. From then on the reporter does."""
    signal.signal(number, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # not sys.stderr, which may be in use
        os.write(2, f"interrupted by {signal.Signals(number).name}\n".encode())
    raise SystemExit(128 + number)
