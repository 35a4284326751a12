"""The states of a task, with the words that `doit`, `doit plan`, `doit -r json` and the report page share."""

from collections.abc import Mapping
from enum import StrEnum


class TaskState(StrEnum):
    """The state of one task, in a run (first group) or before it (second group); the others occur in both."""

    BUILT = "built"
    FETCHED = "fetched"  # from the build cache, where another machine or checkout has put it
    FAILED = "failed"
    FAILED_DEPENDENCY = "skipped: a dependency failed"
    NOT_FINISHED = "not finished"  # the run was interrupted

    TO_FETCH = "to fetch"  # the build cache has its result
    TO_RUN = "to run"
    MAY_RUN = "may run"  # it runs if a task before it changes a file that it reads
    NOT_BUILT = "not built"  # on the report page: to run or may run, and never built so far

    UP_TO_DATE = "up to date"
    IGNORED = "ignored"  # by `doit ignore`, or because it depends on an ignored task
    UNSUPPORTED = "not for this machine"  # the machine lacks a requirement of the stage, such as a GPU
    UNSUPPORTED_DEPENDENCY = "skipped: a dependency is not for this machine"


NOTHING_TO_DO = frozenset({TaskState.UP_TO_DATE, TaskState.UNSUPPORTED, TaskState.UNSUPPORTED_DEPENDENCY})
COUNTED = (TaskState.BUILT, TaskState.FETCHED, TaskState.UP_TO_DATE, TaskState.UNSUPPORTED, TaskState.FAILED)


def format_counts(counts: Mapping[str, int]) -> str:
    """Return the last line of a run: "25 built, 1 not for this machine".

    Args:
        counts: The number of tasks by state.
    """
    return ", ".join(f"{counts[state]} {state}" for state in COUNTED if counts.get(state)) or "nothing to do"
