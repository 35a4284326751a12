"""Writes the no-op cache after a run: a record of each model whose tasks were all checked and found up to date."""

import array
import os
import time
from typing import Any

from build_tasks.doit_plugin import noop_cache, run_results, task_graph
from build_tasks.doit_plugin.folder_listing import MAX_PATHS
from build_tasks.doit_plugin.noop_cache import NoopCache, Record
from build_tasks.doit_plugin.stat_signatures import ABSENT, StatSignature, packed, stat_signatures
from build_tasks.doit_plugin.task_state import NOTHING_TO_DO, TaskState
from build_tasks.formats.ensemble_steps import models_of_steps
from build_tasks.paths import BUILD
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import nothing_missing, stage_of

RECENT_NS = 2_000_000_000
CTIME = 4  # its place in a signature


def update(
    cache: NoopCache,
    tasks: dict[str, Any],
    results: dict[str, run_results.TaskResult],
    messages: dict[str, str],
    row_digests: dict[str, bytes],
    prune_is_ignored: bool,
) -> None:
    """Save the models that are up to date.

    Args:
        cache: The cache as it was loaded at the start of the run.
        tasks: doit's tasks, by name.
        results: The results of this run, by task.
        messages: The messages about tasks that are not for this machine, by task.
        row_digests: Digests of the records that doit read in this run, by task.
        prune_is_ignored: Whether `doit ignore` has marked `prune`, which every run has to report.
    """
    if not cache.only_models or prune_is_ignored or not digest.remembers:
        return
    found = {
        name: record
        for name in cache.changed
        if (record := _record(cache.changed[name], name, tasks, results, messages, row_digests))
    }
    contents = cache.contents
    if contents.global_signature != cache.global_signature:
        contents = noop_cache.Contents(cache.global_signature, b"", {})
    if not found and contents is cache.contents:
        cache.refresh()
        return
    if _recently_edited():
        return
    others = {name: record for name, record in contents.models.items() if name not in found}
    if cache.state_signature != contents.state_signature:
        others = noop_cache.models_with_same_records(others)
    noop_cache.write(noop_cache.Contents(cache.global_signature, cache.state_signature, {**others, **found}))


def _record(
    before: tuple[list[str], bytes, bytes],
    name: str,
    tasks: dict[str, Any],
    results: dict[str, run_results.TaskResult],
    messages: dict[str, str],
    row_digests: dict[str, bytes],
) -> Record | None:
    """Return the record of a model for the cache; None if the model is outdated, or if that is not certain.

    Args:
        before: The model's value in `NoopCache.changed`.
    """
    group = results.get(name)
    if name not in tasks or (group and group.state == TaskState.IGNORED):
        return None
    chain = [task for task in task_graph.required_tasks(tasks, [name]) if tasks[task].actions]
    states = [results[task].state if task in results else None for task in chain]
    stages = [stage for task in chain if (stage := stage_of(tasks[task]))]
    if not set(states) <= NOTHING_TO_DO or len(stages) != len(chain) or not row_digests.keys() >= {*chain, name}:
        return None
    if any(models_of_steps(stage.model) for stage in stages):
        return None  # what the steps of other models need may change although this model does not
    folder, folder_signatures, build_folder = before
    if len(folder) > MAX_PATHS:
        return None
    signatures: dict[str, StatSignature] = {}
    for stage, state in zip(stages, states, strict=True):
        up_to_date = state == TaskState.UP_TO_DATE
        for path in (*stage.dependency_paths(), *stage.outputs.values()):
            if not path.startswith("build_tasks/") and not _add_signatures(path, signatures, up_to_date):
                return None
        for external in filter(None, stage.external_inputs.values()):
            if not _add_signatures(external, signatures, False):
                return None
    paths = sorted(signatures.keys() - set(folder))
    depends_on_machine = any(stage.missing_requirements is not nothing_missing for stage in stages)
    return Record(
        folder=folder,
        folder_signatures=folder_signatures,
        paths=[f"{BUILD}/{name}", *paths],
        stat_signatures=build_folder + packed([number for path in paths for number in signatures[path]]),
        tasks=[*chain, name],
        row_digests=[row_digests[task] for task in (*chain, name)],
        machine=noop_cache.machine_signature() if depends_on_machine else None,
        triton_models=dict(stages[0].model.triton_models),
        counts={str(state): states.count(state) for state in NOTHING_TO_DO if state in states},
        messages=[messages[task] for task in chain if task in messages],
        rows=[
            (row.model, row.format, row.name, str(row.state), *row[4:])
            for row in run_results.model_rows({task: tasks[task] for task in chain}, chain, results)
        ],
    )


def _add_signatures(path: str, signatures: dict[str, StatSignature], required: bool) -> bool:
    """Add the stat of a path, and of all paths below it, from the time when it was checked.

    Args:
        required: Whether the path must exist.
    Returns: False if that stat is not known for certain.
    """
    if path in signatures:
        return True
    identity = digest.identity(path)
    if identity is None:
        if required or os.path.exists(path):
            return False
        signatures[path] = ABSENT
        return True
    signatures[path] = identity
    if os.path.isdir(path):
        return all(_add_signatures(f"{path}/{name}", signatures, True) for name in os.listdir(path))
    return True


def _recently_edited() -> bool:
    """Return whether the project may have been edited while it was imported."""
    signatures = array.array("q", stat_signatures(noop_cache.project_files()))
    return time.time_ns() - max(signatures[CTIME :: len(ABSENT)]) < RECENT_NS
