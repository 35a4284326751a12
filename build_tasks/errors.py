"""The error that a user can correct, and the texts that describe errors."""

import re
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user, or a problem of the user's environment. The message says what to do.

    It is shown without a traceback. All other exceptions keep their traceback.
    """


def first_lines(error: BaseException, count: int = 1) -> str:
    """Return the first non-empty lines of the error's text, joined to one line and without color codes."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:count]) or type(error).__name__


def with_suggestion(found: object, valid: Iterable[str]) -> str:
    """Return the value that was found, and the most similar of the valid names if there is one."""
    import difflib

    similar = difflib.get_close_matches(str(found), list(valid), n=1)
    return f"{found!r}" + (f" (did you mean {similar[0]!r}?)" if similar else "")
