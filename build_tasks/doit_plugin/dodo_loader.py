"""Makes doit's tasks from dodo.py."""

import inspect
from typing import Any

from doit.cmd_base import DodoTaskLoader, TaskLoader2
from doit.loader import generate_tasks

PREFIX = "task_"  # how the names of the functions in dodo.py that make tasks begin


class DodoLoader(DodoTaskLoader):  # type: ignore[misc]  # doit has no types
    """Makes the tasks in the order of dodo.py, as doit's own loader does.

    doit's loader tokenizes the source of each function in dodo.py to find its line, which takes a twentieth of a run
    after a changed key. The compiled function knows its line. What dodo.py does not use is left out: task creators that
    are objects, take parameters or are delayed.

    Args:
        other: The loader that doit has set up.
    """

    def __init__(self, other: TaskLoader2):
        super().__init__()
        self.cmd_names, self.config = other.cmd_names, other.config

    def load_tasks(self, cmd: Any, pos_args: list[str]) -> list[Any]:
        """Return the tasks, with the options that doit's configuration files set for them."""
        creators = [
            (name.removeprefix(PREFIX), value)
            for name, value in self.namespace.items()
            if name.startswith(PREFIX) and inspect.isfunction(value)
        ]
        creators.sort(key=lambda creator: creator[1].__code__.co_firstlineno)
        tasks = [task for name, create in creators for task in generate_tasks(name, create(), create.__doc__)]
        for task in tasks:
            if options := self.config.get(f"task:{task.name}"):
                task.cfg_values = options
        return tasks
