"""The words that this project adds to `doit`, in the environment that it is installed in.

doit finds them by entry points (see pyproject.toml) before it reads a dodo.py, and makes nothing of them until they are
asked for. What they do stands in build_tasks/ of the checkout that doit is started in; only this file is installed, and
it fits every checkout. Where there is none, or a broken one, they say so, and the rest of doit goes on.
"""

import importlib
import os
import sys
from typing import Any

from doit.cmd_base import Command
from doit.reporter import JsonReporter, ZeroReporter

COMMANDS = {
    "Plan": "doit_plugin.plan_command",
    "New": "doit_plugin.new_command",
    "Report": "report.command",
}  # class -> its module in build_tasks


class Unavailable(Command):  # type: ignore[misc]  # doit has no types
    """What stands for a command where it cannot be had."""

    doc_usage = "[...]"

    def parse_execute(self, in_args: list[str]) -> int:
        sys.stderr.write(f"ERROR: doit {self.name}: {self.doc_purpose}\n")
        return 3


def __getattr__(name: str) -> type[Command]:
    if name not in COMMANDS:
        raise AttributeError(name)
    try:
        found: type[Command] = getattr(_module(COMMANDS[name]), name)
    except Exception as error:  # whatever is wrong there, `doit help` shall list the others
        return type(name, (Unavailable,), {"doc_purpose": f"not available: {error}"})
    return found


class Quiet:
    """`doit -r quiet`"""

    desc = "failures, and what stands at the end"

    def __new__(cls, *arguments: Any) -> Any:
        return _reporter("Quiet", ZeroReporter)(*arguments)


class Json:
    """`doit -r json`"""

    desc = "the end of a run as JSON: models, tasks, exit code"

    def __new__(cls, *arguments: Any) -> Any:
        return _reporter("Json", JsonReporter)(*arguments)


def _reporter(name: str, otherwise: type) -> type:
    """The class in the checkout; of a dodo.py of another project, doit's own nearest."""
    try:
        found: type = getattr(_module("doit_plugin.reporter"), name)
    except ModuleNotFoundError:
        return otherwise
    return found


def _module(name: str) -> Any:
    if not os.path.exists("build_tasks/__init__.py"):
        raise ModuleNotFoundError("it works in the folder of a checkout, beside its dodo.py")
    if (here := os.getcwd()) not in sys.path:  # it holds the folder of the script `doit` instead
        sys.path.insert(0, here)
    return importlib.import_module(f"build_tasks.{name}")
