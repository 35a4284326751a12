"""The tasks that a set of tasks requires."""

from collections.abc import Iterable
from typing import Any

GROUPS_BY_NAME = ("engine", "rtx")  # a group on the command line requests each of its engines by name


def required_tasks(tasks: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Return tasks and all their dependencies, each task after its dependencies."""
    seen: set[str] = set()
    ordered: list[str] = []

    def visit(name: str) -> None:
        if name not in seen:
            seen.add(name)
            for dep in tasks[name].task_dep:
                visit(dep)
            ordered.append(name)

    for name in names:
        visit(name)
    return ordered


def requested_tasks(tasks: dict[str, Any], selected: Iterable[str]) -> set[str]:
    """Return the tasks that are requested by the name of a stage, and their dependencies.

    A model on the command line requests none of its tasks by name.
    """
    return set(required_tasks(tasks, [name for name in selected if tasks[name].actions or name in GROUPS_BY_NAME]))
