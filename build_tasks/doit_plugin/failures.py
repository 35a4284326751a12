"""The tasks that failed when they ran last, with the reasons -> build/.failures.json

doit's records hold successes alone. The report needs failures, too: it says what failed, and what to do.
"""

import contextlib
import os
from collections.abc import Mapping

from build_tasks.doit_plugin.run_results import TaskResult
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.json_files import read_json, write_json
from build_tasks.paths import FAILURES
from build_tasks.runtime import atomic_files


def read() -> dict[str, str]:
    """The reasons by task; none if there is no file, or a damaged one."""
    try:
        content = read_json(FAILURES)
    except (OSError, ValueError):
        return {}
    return {str(task): str(reason) for task, reason in content.items()} if isinstance(content, dict) else {}


def update(results: Mapping[str, TaskResult]) -> None:
    """Add the failures of a run, and remove the tasks that are built now."""
    before = read()
    after = {task: reason for task, reason in before.items() if task not in results or not ended_well(results[task])}
    after |= {task: result.reason for task, result in results.items() if result.state == TaskState.FAILED}
    # The report is the only reader: a disk that is full, or read-only, must not end a run.
    with contextlib.suppress(OSError):
        if not after:
            os.remove(FAILURES)
        elif after != before:
            with atomic_files.scratch_dir() as folder:
                write_json(f"{folder}/failures.json", after)
                atomic_files.replace(f"{folder}/failures.json", FAILURES)


def ended_well(result: TaskResult) -> bool:
    return result.state in (TaskState.BUILT, TaskState.FETCHED, TaskState.UP_TO_DATE)
