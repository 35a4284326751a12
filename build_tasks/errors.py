"""The error that a user can correct, and the one place where texts of any source become safe to show.

spec, file name, server's answer ─► printable ─► terminal, log
                                    └─► message_line ─► UserError
"""

import re
from collections.abc import Iterable

MAX_LINE = 300  # characters of one line of a message
TAIL = 100  # of these, what stays of the end of a longer line; the end often says what to do

# Control characters (a terminal obeys them), separators of lines, marks that reverse the direction of text, and halves
# of characters, which come from file names that are not UTF-8 and cannot be encoded.
UNSAFE = r"[\0-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
ESCAPES = {"\t": "\\t", "\r": "\\r"}
# What a URL may hold that is secret: user and password, and the query, in which clouds put signatures.
USER_INFO = r"(?<=://)[^/\s'\"@]*@"
QUERY = r"(?<=[\w/.%~-])\?[^\s'\"<>?=]*=[^\s'\"<>]*"
MAX_LISTED = 130  # characters of a list of names
MAX_SUGGESTED = 100  # characters of a value for which similar names are searched


class UserError(Exception):
    """A mistake of the user, or a problem of the user's environment. The message says what to do.

    It is shown without a traceback. All other exceptions keep their traceback.

    Args:
        lines: The lines of the message, one for each mistake. Each becomes one line that is safe to show.
        limit: Characters of a line. Results that a user needs in full have none, such as those of the accuracy gate.
    """

    def __init__(self, *lines: str, limit: int | None = MAX_LINE):
        super().__init__("\n".join(message_line(line, limit) for line in lines))


def message_line(text: str, limit: int | None = MAX_LINE) -> str:
    """Return a text as one printable line. Where it is longer than the limit, its middle is left out."""
    line = printable(text).replace("\n", "\\n")
    return line if limit is None or len(line) <= limit else f"{line[: limit - TAIL - 3]} … {line[-TAIL:]}"


def listed(names: Iterable[str], more: str = "") -> str:
    """Return names with commas between them. Of many, the first ones, and where the others are listed."""
    text = ", ".join(names)
    return text if len(text) <= MAX_LISTED else f"{text[:MAX_LISTED].rpartition(', ')[0]}, …{more}"


def printable(text: str) -> str:
    """Return a text of any source as it may be shown: without secrets of URLs, and with control characters escaped.

    Newlines stay.
    """
    if "://" in text:
        text = re.sub(USER_INFO, "…@", text)
    if "?" in text:
        text = re.sub(QUERY, "?…", text)
    if text.replace("\n", "").isprintable():  # nearly always; the patterns are compiled only where they are needed
        return text
    return re.sub(UNSAFE, _escape, text)


def _escape(match: "re.Match[str]") -> str:
    character = match[0]
    return ESCAPES.get(character) or (f"\\x{ord(character):02x}" if character < "\x80" else f"\\u{ord(character):04x}")


def first_lines(error: BaseException, count: int = 1) -> str:
    """Return the first non-empty lines of the error's text, joined to one line and without color codes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:count]) or type(error).__name__


def last_line(error: BaseException) -> str:
    """Return the last line of the error's text, with which an error of TorchScript gives its reason; else its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def kind_and_reason(error: BaseException) -> str:
    """Return the class of an error and the first line of its text, "ValueError: too long"; the class alone without."""
    return f"{type(error).__name__}: {first_lines(error)}" if str(error) else type(error).__name__


def with_suggestion(found: object, valid: Iterable[str]) -> str:
    """Return the value that was found, and the most similar of the valid names if there is one."""
    import difflib

    text, names = str(found).casefold(), {name.casefold(): name for name in valid}
    similar = difflib.get_close_matches(text, list(names), n=1) if len(text) <= MAX_SUGGESTED else []
    return f"{found!r}" + (f" (did you mean {names[similar[0]]!r}?)" if similar else "")
