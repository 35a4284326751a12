"""The units of a farm: which tasks run together on one worker, and what that worker has to have.

    outdated stages of a model ─┬─► those of every machine: one unit ─────────────────┐
                                ├─► plans, their figures, for each kind of GPU: a unit, after the first one
                                └─► packages of AOTInductor, in the same way: a unit, after the first one

A unit is a part of the chain of one model, because the stages of a model read each other's files.
"""

from typing import NamedTuple

from build_tasks.doit_plugin.dry_run import Step
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.runtime.stage import Stage

PYTORCH, SLOT = "torch", "build"  # names of resources: PyTorch is installed; one unit at a time
TENSORRT = "tensorrt"
OUTDATED = (TaskState.TO_RUN, TaskState.MAY_RUN)


class Unit(NamedTuple):
    """Tasks that run together.

    Attributes:
        resource: What its worker must have: PYTORCH, "tensorrt:8.6" or "torch:8.6".
        seconds: The time that its tasks took last; 0.0 if they never ran.
    """

    model: str
    resource: str
    tasks: list[str]
    seconds: float

    @property
    def name(self) -> str:
        return f"{self.model} on {self.resource}"


def units_of(steps: list[Step]) -> list[Unit]:
    """Return the units of a plan, the longest first. A model's unit without a GPU comes before those with one.

    Args:
        steps: All tasks of the requested models, as `doit plan` finds them.
    """
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in steps:
        if step.stage is not None and (resource := resource_of(step.stage)) and is_outdated(step):
            groups.setdefault((step.stage.model.name, resource), []).append(step)
    units = [
        Unit(model, resource, [step.task for step in group], sum(step.seconds or 0.0 for step in group))
        for (model, resource), group in groups.items()
    ]
    total: dict[str, float] = {}
    for unit in units:
        total[unit.model] = total.get(unit.model, 0.0) + unit.seconds
    return sorted(units, key=lambda unit: (-total[unit.model], unit.model, unit.resource != PYTORCH))


def is_outdated(step: Step) -> bool:
    """Return whether a step may run on a worker. One that this machine cannot run may run there."""
    return step.state in OUTDATED or step.state in (TaskState.UNSUPPORTED, TaskState.UNSUPPORTED_DEPENDENCY)


def resource_of(stage: Stage) -> str | None:
    """Return what a worker must have to run a stage, None for a stage that runs on the head.

    Stages of milliseconds run on the head, and on a worker where its own stages depend on them. Also on the head run
    stages of plans and packages for no particular kind of GPU, where the head itself is meant, and summaries, which
    need the figures of all kinds.
    """
    if stage.in_process or stage.names_model:
        return None
    if stage.compute_capability is not None:
        return gpu_resource(PYTORCH if PYTORCH in stage.tools else TENSORRT, stage.compute_capability)
    return PYTORCH if stage.made_elsewhere else None


def gpu_resource(package: str, capability: str) -> str:
    """Return the name of the resource of a worker where a package, PYTORCH or TENSORRT, can use a kind of GPU."""
    return f"{package}:{capability}"
