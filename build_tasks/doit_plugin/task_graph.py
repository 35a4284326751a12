"""Which tasks a set of tasks requires."""

from collections.abc import Iterable
from typing import Any

GROUPS_BY_NAME = ("engine", "rtx")  # to ask for one of these groups is to ask for every engine in it


def required_tasks(tasks: dict[str, Any], names: Iterable[str]) -> list[str]:
    """These tasks, and all that they need, each behind what it needs."""
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
    """The tasks that were asked for by name, stage by stage, and all that they need: not those of a whole model."""
    return set(required_tasks(tasks, [name for name in selected if tasks[name].actions or name in GROUPS_BY_NAME]))
