"""What `doit report` tells of one model, as plain data.

    a Step of each task ─► told() ─► its state, reasons, artifact, tools ────┐
    model.*.measured.json  ─► summary.judged() ─► figures and verdicts ──────┴► card()

Whatever is missing or broken in build/ is left out: its stage will run again, and the page says so.
"""

import base64
import contextlib
import io
import os
from collections.abc import Iterator
from typing import Any

from build_tasks.doit_plugin.task_state import TaskState
from build_tasks.json_files import read_json
from build_tasks.report import charts, snapshot_diff
from build_tasks.runtime import atomic_files
from build_tasks.runtime.digests import digest
from build_tasks.runtime.stage import Stage
from build_tasks.spec.model import REDUCED_PRECISIONS, Model
from build_tasks.verification import accuracy_samples, gate, judged_artifacts

SHOWN = 24  # samples with a picture: some dozens of kB
SHORT = 0.1  # seconds
ROOM = 16  # letters in a box of the graph
WORST = 5  # nodes that are named
THUMBNAIL = 96  # pixels, for 48 of a page on a screen of double density

# Of several tasks together, the state is the last of theirs.
STATES = (
    TaskState.UP_TO_DATE,
    TaskState.MAY_RUN,
    TaskState.TO_RUN,
    TaskState.NOT_BUILT,
    TaskState.UNSUPPORTED,
    TaskState.IGNORED,
)

# Stages that make an artifact, with what Triton's model of it is called beside the model; None for files that all
# artifacts share.
ARTIFACTS = {"weights": None, "labels": None, "reference": None, "repair": None, "torchscript": "", "cast": "",
             "onnx": "_onnx",
             "precision": "", "engine": "_trt", "rtx": "_rtx", "preprocess": "_preprocess"}  # fmt: skip
SHARED = ""  # the lane of those

Card = dict[str, Any]


def card(model: Model, tasks: dict[str, Any], steps: list[dict[str, Any]]) -> Card:
    """All that the page tells of a model, as plain data."""
    judged = [row for artifact in artifacts(model) if (row := _judged(model, artifact))]
    lanes = dict.fromkeys(step["lane"] for step in steps)
    made = [step["file"] for step in steps if step["artifact"]]
    return {
        "name": model.name,
        "spec": model.file,
        "formats": model.spec.formats,
        "random": model.seed is not None,
        "reference": model.reference,
        "steps": steps,
        "layout": layout(tasks, steps),
        "rows": [_row(lane, steps, judged) for lane in lanes if lane not in (SHARED, "summary")],
        "tensors": [_tensors(file, tensors) for file in made if (tensors := _json(f"{file}.signature.json"))],
        "configs": list(_configs(steps)),
        "judged": judged,
        "histograms": list(_histograms(judged)),
        "samples": samples(model, judged),
        "layers": _layers(model),
        "converted": model.converted,
        "lacks": {lacks: None for step in steps if (lacks := step["lacks"])},
        "durations": durations(steps),
        "facts": snapshot_diff.facts(steps, judged),
    }


def told(step: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A task as it is told: what it makes, in which state that is, why, and how long it took."""
    stage: Stage = step.stage
    kind, _, name = step.task.partition(":")
    output = stage.outputs.get(kind) or next(iter(stage.outputs.values()))
    never = step.state in (TaskState.TO_RUN, TaskState.MAY_RUN) and not values.get("outputs")
    state = TaskState.NOT_BUILT if never else step.state
    if state == TaskState.UNSUPPORTED_DEPENDENCY:
        state = TaskState.UNSUPPORTED
    return {
        "task": step.task,
        "stage": kind,
        "title": title(kind, os.path.basename(output)),
        "lane": lane(kind, name),
        "state": state,
        "reasons": [] if never else step.reasons,
        "seconds": step.seconds,
        "file": output,
        "artifact": kind in ARTIFACTS,
        "size": atomic_files.size(output),
        "sha256": digest(output),
        "tools": values.get("tools", {}),
        "lacks": stage.missing_requirements(),
    }


def title(stage: str, file: str) -> str:
    """What a task is called where there is little room: its artifact, or what it does."""
    return file if (stage in ARTIFACTS or stage in ("config", "summary")) and len(file) <= ROOM else stage


def lane(stage: str, name: str) -> str:
    """What of the model a task is about: a model of Triton's, a graph, the summary, or what all of these share."""
    suffix = ARTIFACTS.get(stage, "")
    base, dot, rest = name.partition(".")
    return "summary" if stage == "summary" else SHARED if suffix is None else base + suffix + dot + rest


def durations(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """The last run of each task; what took next to nothing is only counted."""
    known = [step for step in steps if step["seconds"] is not None]
    shown = [step for step in known if step["seconds"] >= SHORT]
    return {
        "shown": shown,
        "others": len(known) - len(shown),
        "short": SHORT,
        "total": sum(step["seconds"] for step in known),
        "longest": max((step["seconds"] for step in known), default=0),
    }


def layout(tasks: dict[str, Any], steps: list[dict[str, Any]]) -> charts.Layout:
    """The chain as it is drawn, a lane for each artifact."""
    names = [step["task"] for step in steps]
    needs = {name: {need for need in tasks[name].task_dep if need in names} for name in names}
    return charts.layered(needs, {step["task"]: step["lane"] for step in steps})


def artifacts(model: Model) -> list[judged_artifacts.JudgedArtifact]:
    """What is judged in the chain, and the graphs of other precisions that `doit compare` has measured."""
    found = judged_artifacts.judged_artifacts(model)
    known = {artifact.file for artifact in found}
    return found + [
        judged_artifacts.JudgedArtifact("graph", precision, file)
        for precision in REDUCED_PRECISIONS
        if (file := model.graph_file(precision)) not in known
        and os.path.exists(judged_artifacts.measured_file(model, file))
    ]


def _judged(model: Model, artifact: judged_artifacts.JudgedArtifact) -> dict[str, Any] | None:
    """The figures of an artifact, and the verdict by the spec of now; None where none are of what is there."""
    measured = _json(judged_artifacts.measured_file(model, artifact.file))
    of = {"model": artifact.file, "reference": "reference.json"}
    if not measured or any(measured.get(key) != digest(model.artifact(file)) for key, file in of.items()):
        return None
    rule = gate.settings_of(model, artifact.format, artifact.precision)
    found = judged_artifacts.judge(artifact, measured, rule)
    for output in found["outputs"].values():
        if "limits" in output:
            output["near"] = gate.tie_tolerance(output["limits"], output, rule)
    sound = not any("wrong" in output for output in measured["outputs"].values())
    error, limit = gate.nearest_limit(measured, rule) if sound else (None, None)
    return {**found, "error": error, "limit": limit}


def _row(lane: str, steps: list[dict[str, Any]], judged: list[dict[str, Any]]) -> dict[str, Any]:
    """A model of Triton's, or a graph, in a line."""
    mine = [step for step in steps if step["lane"] == lane]
    made = [step for step in mine if step["artifact"]]
    named = {os.path.basename(step["file"]) for step in made}
    durations = [step["seconds"] for step in mine if step["seconds"] is not None]
    return {
        "name": lane,
        "files": sorted(named),
        "state": max((step["state"] for step in mine), key=STATES.index),
        "size": sum(step["size"] or 0 for step in made) or None,
        "judged": [row for row in judged if row["file"] in named],
        "seconds": sum(durations) if durations else None,
    }


def _tensors(file: str, signature: dict[str, Any]) -> dict[str, Any]:
    rows = [(kind, tensor) for kind in ("input", "output") for tensor in signature[f"{kind}s"]]
    return {"file": os.path.basename(file), "rows": rows}


def _configs(steps: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    for step in steps:
        if step["stage"] == "config":
            with contextlib.suppress(OSError), open(step["file"], encoding="utf-8", errors="replace") as file:
                yield {"name": step["task"].partition(":")[2], "text": file.read()}


def _histograms(judged: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One for each output of each artifact, on one scale."""
    bars = [(row, name, output) for row in judged for name, output in row["outputs"].items() if "wrong" not in output]
    every = [value for _, _, o in bars for value in (*o["errors"], o["limits"]["relative_l2"])]
    for row, name, output in bars:
        yield {
            "artifact": row["artifact"],
            "output": name if len(row["outputs"]) > 1 else None,
            "status": row["status"],
            "errors": output["errors"],
            "limit": output["limits"]["relative_l2"],
            "chart": charts.histogram(output["errors"], output["limits"]["relative_l2"], every),
        }


def samples(model: Model, judged: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Each sample's class by the reference, and by every artifact; those first that any puts into another class."""
    told = [(row, output) for row in judged for output in row["outputs"].values() if "top1_changes" in output]
    if not told:
        return None
    names, labels = _lines(model.artifact("samples.txt")), _lines(model.artifact("labels.txt"))
    if len(names) != told[0][1]["samples"]:
        return None
    ours = [
        (row["artifact"], output, {change["sample"]: change for change in output["top1_changes"]})
        for row, output in told
    ]
    rows = []
    for place, (name, known) in enumerate(zip(names, told[0][1]["classes"], strict=True)):
        cells = [_cell(changes.get(name), output, place) for _, output, changes in ours]
        changed = any(cell["class"] is not None for cell in cells)
        rows.append({"name": name, "class": known, "cells": cells, "changed": changed})
    rows.sort(key=lambda row: not row["changed"])
    source = (
        model.source(model.spec.accuracy.samples)
        if model.spec.accuracy.samples
        else accuracy_samples.SHIPPED_PHOTOGRAPHS
    )
    shown = rows[:SHOWN]
    for row in shown:
        row["picture"] = (
            None if source.endswith(accuracy_samples.TENSOR_SUFFIXES) else thumbnail(f"{source}/{row['name']}")
        )
    return {
        "artifacts": [title for title, _, _ in ours],
        "rows": shown,
        "more": rows[SHOWN:],
        "changed": sum(row["changed"] for row in rows),
        "label": lambda index: labels[index] if index < len(labels) else f"class {index}",
        "source": source,
    }


def _cell(change: dict[str, Any] | None, output: dict[str, Any], place: int) -> dict[str, Any]:
    """What an artifact makes of a sample: another class than the reference, if any, and whether that is a near tie."""
    other, margin = (change["artifact_class"], change["margin"]) if change else (None, 0.0)
    return {"class": other, "margin": margin, "tie": margin <= output["near"], "error": output["errors"][place]}


def thumbnail(path: str) -> str | None:
    """A picture as a data: URI, its middle as a square; None where there is none to be had."""
    try:
        from PIL import Image, ImageOps

        with Image.open(path) as image:
            small = ImageOps.fit(image.convert("RGB"), (THUMBNAIL, THUMBNAIL))
    except (ImportError, OSError):
        return None
    packed = io.BytesIO()
    small.save(packed, "WEBP", quality=70)
    return f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}"


def _layers(model: Model) -> dict[str, Any] | None:
    found = _json(f"{model.artifact(model.graph)}.layers.json") if model.converted else {}
    if "first_jump" not in found:
        return None
    return {**found, "chart": charts.curve(found["layers"], found["first_jump"]), "worst": found["layers"][:WORST]}


def _json(path: str) -> dict[str, Any]:
    """What a file of build/ holds; nothing where it is not there, or broken."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().split("\n")[:-1]
    except (OSError, ValueError):
        return []
