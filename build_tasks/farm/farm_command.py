"""farm: `doit farm` sends what is outdated to the workers of a Dask cluster, and ends with a repository

outdated stages ─► units of a model and a kind of machine ─► workers ─► results in the build cache
                                                                        └─► doit here: fetches, publishes, prunes
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any

from doit.cmd_base import DoitCmdBase
from doit.control import TaskControl
from doit.exceptions import InvalidCommand

from build_tasks.doit_plugin.command_line import RecordsCommand
from build_tasks.doit_plugin.dry_run import plan_steps
from build_tasks.errors import UserError, first_lines, listed, printable, with_suggestion
from build_tasks.farm import cluster, remote, sources
from build_tasks.farm.units import PYTORCH, SLOT, Unit, units_of
from build_tasks.paths import BUILD
from build_tasks.runtime import build_cache
from build_tasks.runtime.cache_storage import StorageError
from build_tasks.runtime.stage import stage_of

LOCAL_FOLDER = f"{BUILD}/.farm"  # the cache and the checkouts of `doit farm --local`
PATIENCE = 60.0  # seconds without any worker for a unit, after which it is given up


class Farm(RecordsCommand, DoitCmdBase):  # type: ignore[misc]  # doit has no types
    """The command."""

    takes_names_first = True
    doc_purpose = "build on the workers of a Dask cluster"
    doc_usage = "[MODEL ...] [--local N]"
    doc_description = (
        "BUILD_SCHEDULER is the address of the scheduler, BUILD_CACHE the build cache that this machine and all "
        "workers reach. `doit worker` starts a worker. --local N starts N workers on this machine. See "
        "docs/how-to/farm.md."
    )
    cmd_options = (
        {"name": "local", "long": "local", "type": int, "default": 0, "help": "start this many workers here"},
    )

    def _execute(self, pos_args: list[str], local: int) -> int:
        control = TaskControl(self.task_list)
        models = sorted({stage.model.name for task in control.tasks.values() if (stage := stage_of(task))})
        for name in pos_args:
            if name not in models:
                raise InvalidCommand(f"expected the name of a model, found {with_suggestion(name, models)}")
        requested = pos_args or models
        units, failed = list[Unit](), set[str]()
        try:
            check_variables(local)
            with contextlib.ExitStack() as stack:
                client = None if local else stack.enter_context(remote_cluster())
                steps = plan_steps(control.tasks, requested, self.dep_manager, with_cache=True)
                if requested_units := units_of(steps):
                    client = client or stack.enter_context(local_cluster(local))
                    tools = {tool for step in steps if step.stage for tool in step.stage.tools}
                    cluster.check_versions(client, tools)
                    units = possible_units(requested_units, cluster.count_resources(client))
                if units:
                    failed = run_units(client, units)
        except (UserError, StorageError) as error:
            raise InvalidCommand(str(error)) from error
        if len(units) < len(requested_units):
            fetch_plans([unit for unit in units if unit.resource != PYTORCH and unit.model not in failed])
        return finish([] if not pos_args and not failed else [name for name in requested if name not in failed], failed)


def emit(line: str) -> None:
    """Print a line at once, with the time."""
    print(printable(f"{time.strftime('%H:%M:%S')} {line}"), flush=True)


def check_variables(local: int) -> None:
    """Check what names the cluster and the cache; `--local` has a cache of its own, unless there is one.

    Args:
        local: Number of workers to start here; 0 for the scheduler of BUILD_SCHEDULER.
    Raises:
        UserError: If something is missing or wrong.
    """
    if local < 0:
        raise UserError(f"--local: expected a number of workers, found {local}")
    if local:
        os.makedirs(LOCAL_FOLDER, exist_ok=True)
        os.environ.setdefault(build_cache.URL, f"file://{os.path.abspath(LOCAL_FOLDER)}/cache")
    if not os.environ.get(build_cache.URL):
        raise UserError(f"{build_cache.URL} is not set: workers and this machine share files through it")
    if os.environ.get(build_cache.MODE) == build_cache.READ:
        raise UserError(f"{build_cache.MODE}={build_cache.READ}: a farm stores the project's files in the cache")
    if not local and not os.environ.get(cluster.SCHEDULER):
        raise UserError(f"{cluster.SCHEDULER} is not set; or use --local N to start workers on this machine")


@contextlib.contextmanager
def local_cluster(workers: int) -> Iterator[Any]:
    """Context manager for the client of a cluster on this machine, which ends with the block."""
    folder = os.path.abspath(LOCAL_FOLDER)
    with cluster.start_local(workers, folder) as address, contextlib.closing(cluster.connect(address)) as client:
        try:
            client.wait_for_workers(workers, timeout=cluster.STARTUP)
        except TimeoutError as error:
            logs = f"{LOCAL_FOLDER}/worker-*.log"
            raise UserError(f"not all workers started within {cluster.STARTUP} s; their logs are {logs}") from error
        yield client


def remote_cluster() -> contextlib.closing[Any]:
    """Return a context manager for the client of the scheduler of BUILD_SCHEDULER."""
    return contextlib.closing(cluster.connect(cluster.check_address(os.environ[cluster.SCHEDULER])))


def possible_units(units: list[Unit], resources: Collection[str]) -> list[Unit]:
    """Return the units that a worker can run, and print the others."""
    for unit in units:
        if unit.resource not in resources:
            emit(f"– {unit.model} not for this cluster: no worker has {unit.resource} ({listed(unit.tasks)})")
    return [unit for unit in units if unit.resource in resources]


def run_units(client: Any, units: list[Unit]) -> set[str]:
    """Run units on the cluster, and return the models of which one failed.

    A unit is sent when a worker is free for it, and not before: Dask would queue units with resources at its workers,
    and some of these would wait while others have nothing to do.

    Raises:
        UserError: If the scheduler has gone.
    """
    cache = build_cache.of_run()
    code = sources.send(cache, sources.files_of_code())
    client.subscribe_topic(remote.TOPIC, lambda event: emit(f"{event[1]['line']}  [{event[1]['name']}]"))
    run_tasks = cluster.with_its_code(remote.run_tasks)
    started = time.monotonic()
    emit(f"{len(units)} units for {len(cluster.workers_of(client))} workers")
    waiting, running = list(units), dict[Any, Unit]()
    failed: set[str] = set()
    seen = {unit.resource: time.monotonic() for unit in units}
    while waiting or running:
        counts = cluster.count_resources(client)
        now = time.monotonic()
        seen |= dict.fromkeys(counts.keys() & seen.keys(), now)
        for unit in startable(waiting, list(running.values()), counts):
            waiting.remove(unit)
            model = sources.send(cache, sources.files_of_model(unit.model))
            arguments = (cache.storage.full_url, code, model, unit.tasks)
            key, resources = f"{unit.name} {time.time_ns()}", {SLOT: 1, unit.resource: 1}
            future = client.submit(run_tasks, *arguments, key=key, resources=resources)
            running[future] = unit
        for future in cluster.wait_for_any(client, running):
            unit = running.pop(future)
            if reason := reason_of_failure(future):
                failed.add(unit.model)
                emit(f"✗ {unit.name}: {reason}")
        for unit in [unit for unit in (*waiting, *running.values()) if now - seen[unit.resource] > PATIENCE]:
            failed.add(unit.model)
            emit(f"✗ {unit.name}: no worker with {unit.resource} is left")
        running = {future: unit for future, unit in running.items() if now - seen[unit.resource] <= PATIENCE}
        waiting = [unit for unit in waiting if unit.model not in failed]
    emit(f"{len(units)} units took {time.monotonic() - started:.1f} s")
    return failed


def startable(waiting: list[Unit], running: list[Unit], counts: dict[str, int]) -> list[Unit]:
    """Return the units that can start now, in their order. Those with a GPU follow the model's part without one.

    Args:
        counts: Number of workers by resource.
    """
    unfinished = {unit.model for unit in (*waiting, *running) if unit.resource == PYTORCH}
    free = {name: count - sum(unit.resource == name for unit in running) for name, count in counts.items()}
    free[SLOT] = counts.get(SLOT, 0) - len(running)
    units = []
    for unit in waiting:
        ready = unit.resource == PYTORCH or unit.model not in unfinished
        if ready and free[SLOT] > 0 and free.get(unit.resource, 0) > 0:
            units.append(unit)
            free[SLOT] -= 1
            free[unit.resource] -= 1
    return units


def reason_of_failure(future: Any) -> str:
    """Return why a unit failed, "" if it did not.

    Raises:
        UserError: If the scheduler has gone.
    """
    if future.status == "cancelled":
        raise UserError(cluster.LOST)
    if future.status == "error":  # the fourth worker died, or an error of the worker's own
        return first_lines(future.exception())
    result = future.result()
    if not result["code"]:
        return ""
    return f"doit ended with {result['code']} on {result['worker']}\n{result['output'].rstrip()}"


def fetch_plans(units: list[Unit]) -> None:
    """Fetch the plans of the kinds that the cluster has.

    doit publishes the plans that exist when it starts, or all of the spec if there is none. So where a kind is missing,
    the others have to be there first.
    """
    if tasks := [task for unit in units for task in unit.tasks]:
        subprocess.run([sys.executable, "-m", "doit", "-r", "quiet", *tasks], check=False)


def finish(models: list[str], failed: set[str]) -> int:
    """Fetch and publish with doit, here. Returns the exit code.

    Args:
        models: The models to build; empty for all.
        failed: Models that failed on the cluster, which doit would only try again here.
    """
    if failed and not models:
        emit(f"failed: {listed(sorted(failed))}")
        return 1
    code = subprocess.run([sys.executable, "-m", "doit", *models], check=False).returncode
    if failed:
        emit(f"failed: {listed(sorted(failed))}")
    return code or (1 if failed else 0)
