"""rebuild: `doit rebuild NAME` builds a model once more, without the cache, and compares every target byte by byte

this checkout's sources ─► a scratch folder ─► doit NAME, without BUILD_CACHE ─► its targets ─┐
this checkout's targets, fetched or built ────────────────────────────────────────────────────┴► the same bytes?
"""

import os
import subprocess
import sys
from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.control import TaskControl
from doit.exceptions import InvalidCommand

from build_tasks.doit_plugin.command_line import RecordsCommand
from build_tasks.doit_plugin.dry_run import plan_steps
from build_tasks.doit_plugin.task_graph import required_tasks
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.errors import listed, with_suggestion
from build_tasks.paths import BUILD, REPOSITORY
from build_tasks.runtime import atomic_files
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Stage, stage_of

DOWNLOADS = f"{BUILD}/.downloads"
NOT_COPIED = {BUILD, REPOSITORY, ".git"}


class Rebuild(RecordsCommand, DoitCmdBase):  # type: ignore[misc]  # doit has no types
    """The command."""

    doc_purpose = "build models once more, without the cache, and compare every byte"
    doc_usage = "NAME [NAME ...]"
    doc_description = (
        "The models are built in a scratch folder, and their targets compared with those of this checkout, which may "
        "come from the build cache. Exit code 1 if one differs. Plans and what was measured on a GPU differ from build "
        "to build, and are left out."
    )
    cmd_options = ()

    def _execute(self, pos_args: list[str]) -> int:
        control = TaskControl(self.task_list)
        tasks: dict[str, Any] = control.tasks
        models = {stage.model.name for task in tasks.values() if (stage := stage_of(task))}
        if not pos_args:
            raise InvalidCommand("expected the name of a model")
        for name in pos_args:
            if name not in models:
                raise InvalidCommand(f"expected the name of a model, found {with_suggestion(name, models)}")
        steps = plan_steps(tasks, pos_args, self.dep_manager)
        if outdated := [step.task for step in steps if step.state in (TaskState.TO_RUN, TaskState.MAY_RUN)]:
            raise InvalidCommand(f"{listed(outdated)}: not up to date; run `doit {' '.join(pos_args)}` first")
        stages = [stage for name in required_tasks(tasks, pos_args) if (stage := stage_of(tasks[name]))]
        with atomic_files.scratch_dir() as folder:
            if code := build_again(folder, pos_args):
                return code
            return compare(stages, folder)


def build_again(folder: str, models: list[str]) -> int:
    """Build models from this checkout's sources in another folder. Returns the exit code of doit."""
    for name in os.listdir():
        if name not in NOT_COPIED:
            os.symlink(os.path.abspath(name), f"{folder}/{name}")
    os.mkdir(f"{folder}/{BUILD}")
    if os.path.isdir(DOWNLOADS):
        os.symlink(os.path.abspath(DOWNLOADS), f"{folder}/{DOWNLOADS}")
    environment = {name: value for name, value in os.environ.items() if name != "BUILD_CACHE"}
    return subprocess.run([sys.executable, "-m", "doit", *models], cwd=folder, env=environment, check=False).returncode


def compare(stages: list[Stage], folder: str) -> int:
    """Print each target that is not the same in a second build. Returns the exit code."""
    same, different, skipped = 0, 0, 0
    for stage in stages:
        for path in stage.outputs.values():
            here, again = digest(path), digest(f"{folder}/{path}", remember=False)
            if here is None and again is None:
                continue
            if not stage.reproducible:
                skipped += 1
            elif here == again:
                same += 1
            else:
                different += 1
                found = [value[:8] if value else "missing" for value in (here, again)]
                print(f"{path}: sha256 {found[0]} here, {found[1]} in the second build", flush=True)
    text = f"{same} of {same + different} targets have the same bytes"
    print(text + (f"; {skipped} depend on a GPU and were not compared" if skipped else ""))
    return 1 if different else 0
