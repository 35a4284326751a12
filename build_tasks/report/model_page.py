"""Collects the data of one model's page.

    a Step of each task    ─► task_row() ─► its state, reasons, artifact, tools ───┐
    model.*.measured.json  ─► judge()    ─► figures and gate results ──────────────┴► model_page()

Files that are missing or broken in build/ are left out. The page shows that their stages will run again.

The tasks of a model are drawn in bands. A *band* is a row of the task diagram: the tasks of one Triton model or of one
graph, the tasks that all of them share, or the summary.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

from build_tasks.bench.records import Run, read_runs
from build_tasks.doit_plugin.dry_run import Step
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.json_files import read_json
from build_tasks.report import charts, overview, snapshot_diff
from build_tasks.report.records import (
    ArtifactRow,
    ConfigFile,
    Durations,
    GateRow,
    HistogramRow,
    ModelPage,
    NodeErrors,
    Snapshot,
    TaskRow,
    TensorTable,
)
from build_tasks.report.sample_table import sample_table
from build_tasks.runtime import atomic_files
from build_tasks.runtime.digests import digest
from build_tasks.spec.model import Model
from build_tasks.spec.tables import REDUCED_PRECISIONS
from build_tasks.verification import gate, judged_artifacts, metrics

MIN_DURATION = 0.1  # seconds; shorter tasks are only counted
MAX_TITLE = 16  # number of characters that fit into a box of the task diagram
MAX_NODES = 5  # number of nodes with large errors that the page names

# States from best to worst. A group of tasks shows its worst state.
STATES = (
    TaskState.UP_TO_DATE,
    TaskState.TO_FETCH,
    TaskState.MAY_RUN,
    TaskState.TO_RUN,
    TaskState.NOT_BUILT,
    TaskState.UNSUPPORTED,
    TaskState.IGNORED,
    TaskState.FAILED,
)

# The stages that write an artifact, each with the suffix of the Triton model that serves it. None: the file is shared
# by all artifacts.
ARTIFACT_SUFFIXES = {
    "weights": None, "labels": None, "reference": None, "repair": None,
    "torchscript": "", "cast": "", "precision": "",
    "onnx": "_onnx", "engine": "_trt", "rtx": "_rtx", "aoti": "_aoti", "preprocess": "_preprocess",
}  # fmt: skip
SHARED_BAND, SUMMARY_BAND = "", "summary"


def model_page(model: Model, dependencies: dict[str, set[str]], tasks: list[TaskRow], before: Snapshot) -> ModelPage:
    """The data of a model's page.

    Args:
        dependencies: The names of the tasks that each task requires.
        tasks: The tasks of the model, in the order of the build.
        before: The snapshot of the last report.
    """
    gate_results = []
    for artifact in measured_artifacts(model):
        if row := gate_row(model, artifact):
            gate_results.append(row)
            mark_refused(tasks, overview.gate_failure(model, row, artifact.format, artifact.precision), row.file)
    mark_waiting(tasks, dependencies)
    run = overview.last_run(read_runs(model.artifact("bench.json")))
    bands = [band for band in dict.fromkeys(task.band for task in tasks) if band not in (SHARED_BAND, SUMMARY_BAND)]
    snapshot = snapshot_diff.take_snapshot(tasks, gate_results)
    names = {task.task for task in tasks}
    return ModelPage(
        name=model.name,
        spec=model.file,
        formats=list(model.spec.formats),
        random=model.seed is not None,
        reference=model.reference,
        tasks=tasks,
        graph=charts.task_graph(
            {task.task: dependencies[task.task] & names for task in tasks}, {task.task: task.band for task in tasks}
        ),
        artifacts=[artifact_row(model, band, tasks, gate_results, run) for band in bands],
        gate_results=gate_results,
        histograms=list(histograms(gate_results)),
        samples=sample_table(model, gate_results),
        has_reduced_graph=model.converted,
        node_errors=node_errors(model),
        tensors=list(tensor_tables(tasks)),
        configs=list(config_files(tasks)),
        bench=run,
        missing=missing_by_reason(tasks),
        durations=durations(tasks),
        snapshot=snapshot,
        changes=snapshot_diff.describe_changes(before.models.get(model.name), snapshot),
    )


def task_row(step: Step, values: dict[str, Any], failure: str | None) -> TaskRow:
    """The row of a task: its target, state, reasons and duration.

    Args:
        step: The task's state and reasons, from a dry run. The task is a stage.
        values: doit's record of the task's last success.
        failure: Why the task failed when it ran last; None if it did not.
    """
    assert step.stage
    stage, _, name = step.task.partition(":")
    output = step.stage.outputs.get(stage) or next(iter(step.stage.outputs.values()))
    never_built = step.state in (TaskState.TO_RUN, TaskState.MAY_RUN) and not values.get("outputs")
    state = TaskState.NOT_BUILT if never_built else step.state
    if state == TaskState.UNSUPPORTED_DEPENDENCY:
        state = TaskState.UNSUPPORTED
    if failure and state in (TaskState.NOT_BUILT, TaskState.TO_RUN, TaskState.MAY_RUN):
        state = TaskState.FAILED
    else:
        failure = None
    return TaskRow(
        task=step.task,
        stage=stage,
        title=box_title(stage, os.path.basename(output)),
        band=band_of(stage, name),
        state=state,
        reasons=[failure] if failure else [] if never_built else step.reasons,
        seconds=step.seconds,
        file=output,
        is_artifact=stage in ARTIFACT_SUFFIXES,
        size=atomic_files.size(output),
        sha256=digest(output),
        tools=values.get("tools", {}),
        missing=step.stage.missing_requirements(),
        failure=failure,
    )


def box_title(stage: str, file: str) -> str:
    """The title of a box of the task diagram: the task's file, if it is short and important, otherwise its stage."""
    return file if stage in (*ARTIFACT_SUFFIXES, "config", "summary") and len(file) <= MAX_TITLE else stage


def band_of(stage: str, name: str) -> str:
    """The band of a task: the name of a Triton model or graph, SUMMARY_BAND or SHARED_BAND."""
    if stage == "summary":
        return SUMMARY_BAND
    suffix = ARTIFACT_SUFFIXES.get(stage, "")
    base, dot, precision = name.partition(".")
    return SHARED_BAND if suffix is None else base + suffix + dot + precision


def measured_artifacts(model: Model) -> list[judged_artifacts.JudgedArtifact]:
    """The artifacts that the gate checks in a build, and graphs of other precisions that `doit compare` measured."""
    artifacts = judged_artifacts.judged_artifacts(model)
    files = {artifact.file for artifact in artifacts}
    return artifacts + [
        judged_artifacts.JudgedArtifact("graph", precision, file)
        for precision in REDUCED_PRECISIONS
        if (file := model.graph_file(precision)) not in files
        and os.path.exists(judged_artifacts.measured_file(model, file))
    ]


def gate_row(model: Model, artifact: judged_artifacts.JudgedArtifact) -> GateRow | None:
    """The figures of an artifact, compared with the current limits; None if they were measured on older files."""
    measured = cast(metrics.MeasuredFile, read_object(judged_artifacts.measured_file(model, artifact.file)))
    files = {"model": artifact.file, "reference": "reference.json"}
    if not measured or any(measured.get(key) != digest(model.artifact(file)) for key, file in files.items()):
        return None
    settings = gate.settings_of(model, artifact.format, artifact.precision)
    judged = judged_artifacts.judge(artifact, measured, settings)
    outputs = judged["outputs"]
    complete = not any("wrong" in output for output in outputs.values())
    error, limit = gate.nearest_limit(measured, settings) if complete else (None, None)
    return GateRow(
        artifact=judged["artifact"],
        file=judged["file"],
        status=judged["status"],
        reason=judged["reason"],
        outputs=outputs,
        tie_tolerances={
            name: gate.tie_tolerance(output["limits"], output, settings)
            for name, output in outputs.items()
            if "limits" in output
        },
        error=error,
        limit=limit,
        device=judged["device"],
        traced_away=read_object(f"{model.artifact(artifact.file)}.signature.json").get("traced_away"),
    )


def mark_refused(tasks: list[TaskRow], failure: str | None, file: str) -> None:
    """Show the task of the gate as failed, also if the limits have changed since it ran."""
    for task in tasks:
        if failure and task.stage == "accuracy" and task.file.endswith(f"/{file}.verdict.json"):
            task.state, task.reasons, task.failure = TaskState.FAILED, [failure], failure


def mark_waiting(tasks: list[TaskRow], dependencies: dict[str, set[str]]) -> None:
    """Mark the tasks that are not up to date and depend on a failed one, directly or through others."""
    failed_ancestors = {task.task: task.task for task in tasks if task.failure}
    for task in tasks:  # a task comes after those that it depends on
        found = sorted(failed_ancestors[name] for name in dependencies[task.task] if name in failed_ancestors)
        if found and task.state in (TaskState.TO_FETCH, TaskState.NOT_BUILT, TaskState.TO_RUN, TaskState.MAY_RUN):
            task.waits_for = failed_ancestors[task.task] = found[0]
            task.reasons = [f"depends on {found[0]}, which failed"]


def missing_by_reason(tasks: list[TaskRow]) -> dict[str, list[str]]:
    """The Triton models of tasks that this machine cannot run, by what it lacks."""
    missing: dict[str, list[str]] = {}
    for task in tasks:
        if task.missing and task.state == TaskState.UNSUPPORTED and task.band:
            names = missing.setdefault(task.missing, [])
            names.extend({task.band} - {*names})
    return missing


def artifact_row(
    model: Model, band: str, tasks: list[TaskRow], gate_results: list[GateRow], run: Run | None
) -> ArtifactRow:
    """The row of a band: the figures of all its tasks together."""
    members = [task for task in tasks if task.band == band]
    artifacts = [task for task in members if task.is_artifact]
    files = sorted({os.path.basename(task.file) for task in artifacts})
    formats = {model.triton_name(each): each for each in (*model.served_formats, *model.ensemble_parts)}
    model_format = formats.get(band)
    return ArtifactRow(
        name=band,
        format=model_format,
        files=files,
        state=TaskState.FAILED
        if any(task.waits_for for task in members)
        else max((task.state for task in members), key=STATES.index),
        size=sum(task.size or 0 for task in artifacts) or None,
        gate_results=[row for row in gate_results if row.file in files],
        served=overview.served_model(model, band),
        speed=overview.speed_of(run, model_format, [task.file for task in artifacts]),
    )


def histograms(gate_results: list[GateRow]) -> Iterator[HistogramRow]:
    """A histogram for each output of each artifact, all with the same scale."""
    measured = [
        (row, name, output) for row in gate_results for name, output in row.outputs.items() if "wrong" not in output
    ]
    values = [value for *_, output in measured for value in (*output["errors"], output["limits"]["relative_l2"])]
    for row, name, output in measured:
        limit = output["limits"]["relative_l2"]
        yield HistogramRow(
            artifact=row.artifact,
            output=name if len(row.outputs) > 1 else None,
            status=row.status,
            errors=output["errors"],
            limit=limit,
            chart=charts.histogram(output["errors"], limit, values),
        )


def node_errors(model: Model) -> NodeErrors | None:
    """The errors that `doit layers` measured in the graph that engines are compiled from; None if it has not run."""
    report = read_object(f"{model.artifact(model.graph)}.layers.json") if model.converted else {}
    if "first_jump" not in report:
        return None
    return NodeErrors(
        precision=report["precision"],
        samples=report["samples"],
        first_jump=report["first_jump"],
        worst=report["layers"][:MAX_NODES],
        chart=charts.curve(report["layers"], report["first_jump"]),
    )


def tensor_tables(tasks: list[TaskRow]) -> Iterator[TensorTable]:
    """The tensors of each artifact that has a signature."""
    for task in tasks:
        if task.is_artifact and (signature := read_object(f"{task.file}.signature.json")):
            rows = [(kind, tensor) for kind in ("input", "output") for tensor in signature[f"{kind}s"]]
            yield TensorTable(os.path.basename(task.file), rows)


def config_files(tasks: list[TaskRow]) -> Iterator[ConfigFile]:
    for task in tasks:
        if task.stage == "config":
            with contextlib.suppress(OSError), open(task.file, encoding="utf-8", errors="replace") as file:
                yield ConfigFile(task.task.partition(":")[2], file.read())


def durations(tasks: list[TaskRow]) -> Durations:
    """The durations of the last run of each task, without tasks that never ran."""
    seconds = [task.seconds for task in tasks if task.seconds is not None]
    long_tasks = [task for task in tasks if task.seconds is not None and task.seconds >= MIN_DURATION]
    return Durations(
        tasks=long_tasks,
        others=len(seconds) - len(long_tasks),
        threshold=MIN_DURATION,
        total=sum(seconds),
        longest=max(seconds, default=0),
    )


def read_object(path: str) -> dict[str, Any]:
    """The JSON object in a file below build/; empty if the file is missing or broken."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
