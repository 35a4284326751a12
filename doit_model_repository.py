"""The commands and reporters that this project adds to `doit`, in the environment that it is installed in.

doit finds them by entry points (see pyproject.toml) before it reads a dodo.py. Its own commands are among them, because
this project adds help and messages to them. The code is in build_tasks/ of the checkout that doit is started in. Only
this file is installed, and it fits every checkout. Where there is no checkout, doit's commands and reporters are doit's
own, and the other commands report that they are not available.
"""

import importlib
import os
import sys
from typing import Any

from doit.cmd_base import Command, DodoTaskLoader
from doit.cmd_run import Run as DoitRun
from doit.doit_cmd import DoitMain
from doit.reporter import JsonReporter, ZeroReporter

VERSION = (0, 2)  # of the distribution, without the patch; see require_installed_commands in doit_plugin/state.py

COMMANDS = {
    "Plan": "doit_plugin.plan_command",
    "New": "doit_plugin.new_command",
    "Adopt": "doit_plugin.adopt_command",
    "Report": "report.command",
    "Cache": "doit_plugin.cache_command",
    "Rebuild": "doit_plugin.rebuild_command",
    "Verify": "delivery.verify_command",
    "Sign": "delivery.sign_command",
    "Push": "delivery.push_command",
    "Farm": "farm.farm_command",
    "Worker": "farm.worker_command",
}  # class -> its module in build_tasks
DOIT_COMMANDS = {command.__name__: command for command in DoitMain.DOIT_CMDS if command is not DoitRun}


class Unavailable(Command):  # type: ignore[misc]  # doit has no types
    """A command that cannot be imported. It prints the reason."""

    doc_usage = "[...]"

    def parse_execute(self, in_args: list[str]) -> int:
        sys.stderr.write(f"ERROR: doit {self.name}: {self.doc_purpose}\n")
        return 3


class Loader(DodoTaskLoader):  # type: ignore[misc]  # doit has no types
    """doit's own loader of dodo.py. doit creates it before it reads the command line.

    `doit --help` and an empty word, such as an unset variable of a shell leaves, are answered here: doit itself prints
    its own overview for the first, and stops with a traceback at the second.
    """

    def __init__(self) -> None:
        super().__init__()
        words = sys.argv[1:]
        if "" in words:
            sys.stderr.write("ERROR: one word of the command line is empty; `doit help` shows what can be typed\n")
            raise SystemExit(3)
        if words[:1] == ["--help"] and os.path.exists("build_tasks/doit_plugin/usage.py"):
            print(_module("doit_plugin.usage").USAGE)
            raise SystemExit(0)


class OtherRun(DoitRun):  # type: ignore[misc]  # doit has no types
    """`doit run` outside a checkout: doit's own, unless an option such as `-f` leads to the dodo.py of a checkout."""

    name = "run"

    def execute(self, params: Any, args: list[str]) -> Any:
        folder = os.path.dirname(_dodo_file(params))
        if params["cwdPath"] is None and os.path.exists(f"{folder}/build_tasks/doit_plugin/run_command.py"):
            os.chdir(folder)  # as doit itself does before it loads a dodo.py
            params["dodoFile"] = os.path.basename(params["dodoFile"])
            command = _module("doit_plugin.run_command").Run(
                task_loader=self.loader, config=self.config, bin_name=self.bin_name, opt_vals=self.opt_vals
            )
            command.load_plugins()
            return command.execute(params, args)
        return super().execute(params, args)


def __getattr__(name: str) -> type[Command]:
    if name != "Run" and name not in COMMANDS and name not in DOIT_COMMANDS:
        raise AttributeError(name)
    try:
        if name in DOIT_COMMANDS:
            return _class("doit_plugin.core_commands", name, DOIT_COMMANDS[name])
        if name == "Run":
            return _class("doit_plugin.run_command", "Run", OtherRun)
        command: type[Command] = getattr(_module(COMMANDS[name]), name)
    except Exception as error:  # one broken command must not keep `doit help` from listing the others
        return type(name, (Unavailable,), {"doc_purpose": f"not available: {error}"})
    return command


class Quiet:
    """`doit -r quiet`"""

    desc = "failures, and the totals at the end"

    def __new__(cls, *arguments: Any) -> Any:
        return _class("doit_plugin.reporter", "Quiet", ZeroReporter)(*arguments)


class Json:
    """`doit -r json`"""

    desc = "the end of a run as JSON: models, tasks, exit code"

    def __new__(cls, *arguments: Any) -> Any:
        return _class("doit_plugin.reporter", "Json", JsonReporter)(*arguments)


def _class(module: str, name: str, default: type) -> type:
    """Return a class of the checkout, or `default` if there is no checkout."""
    try:
        found: type = getattr(_module(module), name)
    except ModuleNotFoundError:
        return default
    return found


def _module(name: str) -> Any:
    if not os.path.exists("build_tasks/__init__.py"):
        raise ModuleNotFoundError("it works in the folder of a checkout, beside its dodo.py")
    if (folder := os.getcwd()) not in sys.path:  # the script `doit` has its own folder there
        sys.path.insert(0, folder)
    importlib.import_module("build_tasks.doit_plugin.standard_streams").protect()
    return importlib.import_module(f"build_tasks.{name}")


def _dodo_file(params: Any) -> str:
    """Return the path of the dodo.py that doit will load; see doit/loader.py, get_module."""
    path: str = os.path.abspath(params["dodoFile"])
    while params["seek_file"] and not os.path.exists(path):
        folder, file = os.path.split(path)
        if folder == (parent := os.path.dirname(folder)):
            break
        path = os.path.join(parent, file)
    return path
