"""The one exception that is the user's to mend, how it quotes the errors of others, and how it hints at names."""

import re
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's, or of his surroundings; its message ends the search.

    It is shown as one line without a traceback. Everything else keeps its traceback.
    """


def first_lines(error: BaseException, count: int = 1) -> str:
    """The first lines of the error's text that say something, as one line and without colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:count]) or type(error).__name__


def hinted(found: object, valid: Iterable[str]) -> str:
    """What was found, with the nearest of the valid names."""
    import difflib

    near = difflib.get_close_matches(str(found), list(valid), n=1)
    return f"{found!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
