"""doit's own commands, with this project's help and with mistakes in one line (command_line.py)."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from doit import (
    cmd_clean,
    cmd_completion,
    cmd_dumpdb,
    cmd_forget,
    cmd_help,
    cmd_ignore,
    cmd_info,
    cmd_list,
    cmd_resetdep,
    cmd_strace,
)
from doit.cmd_base import opt_depfile
from doit.cmdparse import CmdOption, TaskParse
from doit.exceptions import InvalidCommand

from build_tasks.doit_plugin import state_file
from build_tasks.doit_plugin.command_line import OneLineMistakes, RecordsCommand
from build_tasks.doit_plugin.standard_streams import keep_lines_whole
from build_tasks.doit_plugin.state import decode
from build_tasks.doit_plugin.usage import USAGE
from build_tasks.paths import STATE_DB


class Help(OneLineMistakes, cmd_help.Help):  # type: ignore[misc]  # doit has no types
    """`doit help` prints what a person can type; `doit help NAME` the options of a command or a task."""

    doc_purpose = "what can be typed; `doit help NAME`: the options of a command or a task"

    def print_help(self, names: Sequence[str]) -> int:
        return int(self.execute({}, list(names)))

    def execute(self, params: Any, args: list[str]) -> int:
        if not args or len(args) > 1:
            print(USAGE)
        elif args == ["task"] or args[0] in self.cmds:
            return int(super().execute(params, args))
        else:
            options = self.cmdparser.parse([])[0]
            options.update(self.opt_vals)
            if not super(cmd_help.Help, self).execute(options, args):
                raise InvalidCommand(not_found=args[0])
        return 0 if len(args) < 2 else 3

    def _execute(self, pos_args: list[str]) -> bool:
        """Print the description and the options of a task. A group has the options of its tasks."""
        tasks = {task.name: task for task in self.task_list}
        if (task := tasks.get(pos_args[0])) is None:
            return False
        print(f"{task.name}  {task.doc}")
        subtasks = [tasks[name] for name in task.task_dep if tasks[name].subtask_of == task.name]
        params = list(task.params) or (list(subtasks[0].params) if subtasks else [])
        for option in TaskParse([CmdOption(option) for option in params]).options:
            print("\n".join(option.help_doc()))
        if subtasks:
            print(f"tasks: {', '.join(subtask.name for subtask in subtasks)}")
        return True


class SortedSet(set[str]):
    """A set that is printed in the same order in every run. doit keeps the input files of a task in a plain set."""

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(super().__iter__()))


class List(RecordsCommand, cmd_list.List):  # type: ignore[misc]  # doit has no types
    """`doit list`. With --status, a group is up to date if all of its tasks are."""

    def _print_task(self, template: str, task: Any, status: bool, list_deps: bool, tasks: dict[str, Any]) -> None:
        task.file_dep = SortedSet(task.file_dep)
        if not status or task.actions or not task.task_dep:
            super()._print_task(template, task, status, list_deps, tasks)
            return
        up_to_date = all(self._is_up_to_date(tasks[name], tasks) for name in task.task_dep)
        self.outstream.write(template.format(name=task.name, doc=task.doc, status="U" if up_to_date else "R"))

    def _is_up_to_date(self, task: Any, tasks: dict[str, Any]) -> bool:
        if task.actions or not task.task_dep:
            return bool(self.dep_manager.get_status(task, tasks).status == "up-to-date")
        return all(self._is_up_to_date(tasks[name], tasks) for name in task.task_dep)


class Info(RecordsCommand, cmd_info.Info):  # type: ignore[misc]  # doit has no types
    """`doit info`."""

    def _execute(self, pos_args: list[str], hide_status: bool = False) -> Any:
        unknown = [name for name in pos_args if name not in {task.name for task in self.task_list}]
        if unknown:
            raise InvalidCommand(not_found=unknown[0])
        for task in self.task_list:  # otherwise doit prints the objects
            if task.name in pos_args:
                options = TaskParse([CmdOption(option) for option in task.params]).options
                task.file_dep = SortedSet(task.file_dep)
                task.params = [line.strip() for option in options for line in option.help_doc()]
                task.meta = None
        return super()._execute(pos_args, hide_status)

    @staticmethod
    def get_reasons(reasons: dict[str, Any]) -> str:
        """Return the reasons why a task would run, without the arguments of the functions that found them."""
        text: str = cmd_info.Info.get_reasons(reasons)
        return re.sub(r" \(args=\[.*\], kwargs=\{.*\}\)$", "", text, flags=re.MULTILINE)


class Clean(RecordsCommand, cmd_clean.Clean):  # type: ignore[misc]
    """`doit clean`."""


class Forget(RecordsCommand, cmd_forget.Forget):  # type: ignore[misc]
    """`doit forget`."""


class Ignore(RecordsCommand, cmd_ignore.Ignore):  # type: ignore[misc]
    """`doit ignore`."""


class ResetDep(RecordsCommand, cmd_resetdep.ResetDep):  # type: ignore[misc]
    """`doit reset-dep`."""


class DumpDB(OneLineMistakes, cmd_dumpdb.DumpDB):  # type: ignore[misc]
    """`doit dumpdb` prints the record of each task. doit's own command reads no SQLite."""

    doc_purpose = "print the record of each task, as JSON"
    cmd_options = ({**opt_depfile, "default": STATE_DB},)

    def execute(self, params: Any, args: list[str]) -> None:
        keep_lines_whole()
        for task, row in sorted(state_file.read(params["dep_file"]).items()):
            print(f"{task} -> {json.dumps(decode(row), indent=1)}")


class Strace(RecordsCommand, cmd_strace.Strace):  # type: ignore[misc]
    """`doit strace`."""


class TabCompletion(OneLineMistakes, cmd_completion.TabCompletion):  # type: ignore[misc]
    """`doit tabcompletion`."""

    def execute(self, params: Any, args: list[str]) -> Any:
        keep_lines_whole()
        return super().execute(params, args)
