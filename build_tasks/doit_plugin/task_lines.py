"""Parts of the lines on a task: why it runs, and what its stage returned about the targets."""

from typing import Any

from build_tasks.runtime.fingerprint import NEVER_BUILT

MAX_WIDTH = 160  # characters of a reason, which `doit info` shows in full


def stale_reason(task: Any) -> str:
    """Return why a task runs again: the first difference of its fingerprint."""
    reasons = [reason for check, _, _ in task.uptodate for reason in getattr(check, "reasons", [])]
    if not reasons or reasons == [NEVER_BUILT]:
        return ""
    first = reasons[0] if len(reasons[0]) <= MAX_WIDTH else f"{reasons[0][:MAX_WIDTH]} …"
    return first + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")


def format_notes(notes: dict[str, Any]) -> str:
    """Return the notes of a stage as one line, without its table."""
    return ", ".join(f"{key}: {format_note(value)}" for key, value in notes.items() if key != "table")


def format_note(value: object) -> str:
    """Return a note in words: a list as "1, 2, 3", and a list of shapes as "3 x 32 x 32, 4"."""
    if isinstance(value, list):
        return ", ".join(
            (" x ".join(map(str, item)) or "1") if isinstance(item, list) else format_note(item) for item in value
        )
    return f"{value:.1e}" if isinstance(value, float) else str(value)
