"""What a reader asks first about a Triton model: what is served, is it fast, what failed, and what to do.

model_repository/<name>  ─► served_model() ─┐
bench.json               ─► speed_of()     ─┼─► the table of models, as HTML and as Markdown
.failures.json, the gate ─► failure_of()   ─┘
"""

import os
import re
from collections.abc import Sequence

from build_tasks.bench.records import Run
from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.errors import message_line
from build_tasks.paths import REPOSITORY
from build_tasks.provenance.bill_of_materials import BOM_FILE
from build_tasks.report.records import ArtifactRow, GateRow, ModelPage, Served, Speed
from build_tasks.runtime.digests import digest
from build_tasks.spec.model import Model
from build_tasks.stages.accuracy import advice
from build_tasks.text_table import format_size
from build_tasks.triton.repository import CONFIG_FILE, release_mark
from build_tasks.verification import gate

COLUMNS = ("model", "state", "accuracy", "speed", "served", "size")


def served_model(model: Model, name: str) -> Served | None:
    """What the repository holds of a Triton model; None if it is not published."""
    folder = f"{REPOSITORY}/{name}"
    try:
        versions = sorted(int(entry) for entry in os.listdir(folder) if entry.isdecimal())
        with open(f"{folder}/{CONFIG_FILE}", encoding="utf-8", errors="replace") as file:
            header = file.readline()
    except OSError:
        return None
    match = re.search(re.escape(release_mark("")) + r"(\S+)$", header)
    return Served(versions, match[1] if match else model.release) if versions else None


def last_run(runs: Sequence[Run]) -> Run | None:
    """The newest run of `doit bench`, of whatever machine; None if there is none."""
    return max(runs, key=lambda run: run.date, default=None)


def speed_of(run: Run | None, model_format: str | None, paths: Sequence[str]) -> Speed | None:
    """The figures of a format in a run of `doit bench`; None if it was not measured.

    Args:
        paths: The artifact that is served now.
    """
    points = [point for point in run.points if point.model_format == model_format] if run else []
    if run is None or not points:
        return None
    best, first = max(points, key=lambda point: point.images_per_s), min(points, key=lambda point: point.load[:2])
    timing = run.measured.get(str(model_format))
    measured = timing.sha256 if timing else None
    current = measured is None or measured in [digest(path) for path in paths]
    return Speed(best.images_per_s, best.batch, first.p50_ms, first.batch, current)


def gate_failure(model: Model, row: GateRow, model_format: str, precision: str) -> str | None:
    """Why the gate refuses an artifact, and what to do; None if it does not."""
    if row.status != "refused":
        return None
    settings = {**gate.settings_of(model, model_format, precision), "model": model.name}
    return f"{row.reason}{advice(settings)}"


def next_steps(page: ModelPage) -> list[str]:
    """What is not as it should be in a model, and the commands that mend it. A text in backticks is a command."""
    failed = [task for task in page.tasks if task.failure]
    steps = [f"`{task.task}` failed: {task.failure}" for task in failed]
    if failed:
        waiting = sum(bool(task.waits_for) for task in page.tasks)
        others = f", and {_tasks(waiting)} skipped until then" if waiting else ""
        manual = "; docs/how-to/failed-gate.md shows what can be done" if failed[0].stage == "accuracy" else ""
        steps.append(f"`doit {page.name}` tries again{others}{manual}.")
    counts = {state: sum(task.state == state and not task.waits_for for task in page.tasks) for state in TaskState}
    if stale := counts[TaskState.TO_RUN] + counts[TaskState.MAY_RUN]:
        steps.append(f"{_tasks(stale)} outdated: `doit {page.name}` builds {'it' if stale == 1 else 'them'} again.")
    if fetched := counts[TaskState.TO_FETCH]:
        them = "it" if fetched == 1 else "them"
        steps.append(f"{_tasks(fetched)} in the build cache: `doit {page.name}` fetches {them}.")
    if never := counts[TaskState.NOT_BUILT]:
        steps.append(f"{_tasks(never)} not built: `doit {page.name}` builds {'it' if never == 1 else 'them'}.")
    steps += [f"{', '.join(names)}: this machine lacks {missing}." for missing, names in page.missing.items()]
    return steps


def _tasks(count: int) -> str:
    return "1 task is" if count == 1 else f"{count} tasks are"


def accuracy_text(row: ArtifactRow) -> str:
    """The figures behind a gate result: the error with its limit, and how many samples keep their class."""
    if not row.gate_results:
        return ""
    result = row.gate_results[0]
    parts = [f"error {result.error}, limit {result.limit}"] if result.error else []
    agreements = [output["agreement"] for output in result.outputs.values() if "agreement" in output]
    top1 = [agreement["top1"] for agreement in agreements if "top1" in agreement]
    parts += [f"same class in {counts['hits']} of {counts['of']}" for counts in top1[:1]]
    return "; ".join(parts)


def speed_text(row: ArtifactRow) -> str:
    """The figures of the last benchmark."""
    if row.speed is None:
        return ""
    speed = row.speed
    outdated = "" if speed.is_current else ", of an older build"
    at_batch = f" at batch {speed.batch};" if speed.batch != speed.smallest_batch else ","
    return (
        f"{speed.images_per_s:.0f} images/s{at_batch} {speed.p50_ms:.1f} ms at batch {speed.smallest_batch}{outdated}"
    )


def served_text(row: ArtifactRow) -> str:
    """The versions in the repository, and their release."""
    if row.served is None:
        return "not published" if row.format else "only in engines"
    versions = ", ".join(map(str, row.served.versions))
    return f"version {versions}, Triton {row.served.release}"


def bom_link(row: ArtifactRow) -> str | None:
    """The bill of materials of the newest version, relative to the page; None if there is none."""
    path = f"{REPOSITORY}/{row.name}/{row.served.versions[-1]}/{BOM_FILE}" if row.served else ""
    return f"../{path}" if path and os.path.isfile(path) else None


def format_markdown(pages: Sequence[ModelPage]) -> str:
    """The table of models and the next steps as Markdown, for the summary of a CI job."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for page in pages:
        for row in page.artifacts:
            status = row.gate_results[0].status if row.gate_results else ""
            accuracy = ": ".join(filter(None, (status, accuracy_text(row))))
            size = format_size(row.size) if row.size else ""
            cells = (row.name, row.state, accuracy, speed_text(row), served_text(row), size)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    for page in pages:
        if steps := next_steps(page):
            lines += ["", f"**{_cell(page.name)}**", "", *(f"- {_cell(step)}" for step in steps)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """A text as one cell of a Markdown table. Names and reasons may hold any character; commands stay in backticks."""
    escaped = re.sub(r"([|\\*_\[\]#])", r"\\\1", message_line(text, limit=None).replace("<", "&lt;"))
    return re.sub("`[^`]*`", lambda code: re.sub(r"\\(.)", r"\1", code[0]), escaped)
