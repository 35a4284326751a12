"""summary: the accuracy of all artifacts of a model -> accuracy.json for programs, accuracy.svg for people

    model.*.measured.json ─► figures, limits, gate results ─► a table on the terminal, accuracy.json, accuracy.svg

`doit compare:NAME` does the same for every precision of the graph, on demand -> precisions.json, precisions.svg. Both
include the artifacts that the gate refuses.
"""

import os
from typing import Any, Literal, TypedDict

from build_tasks.json_files import read_json, write_json
from build_tasks.runtime import machine_bound
from build_tasks.runtime.digests import digest
from build_tasks.runtime.distributions import installed_version
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model
from build_tasks.spec.tables import REDUCED_PRECISIONS
from build_tasks.text_table import Table
from build_tasks.verification import accuracy_samples, gate
from build_tasks.verification.judged_artifacts import (
    ArtifactResult,
    JudgedArtifact,
    JudgedOutput,
    judge,
    judged_artifacts,
    measured_file,
    wilson_lower_bound,
)
from build_tasks.verification.metrics import MeasuredFile


class SampleCounts(TypedDict):
    """The accuracy samples that all figures of a summary come from."""

    source: str  # the folder or file
    count: int
    distinct: int


class Summary(TypedDict):
    """The content of accuracy.json and precisions.json."""

    model: str
    samples: SampleCounts
    preprocessing: dict[str, Any]  # the content of preprocessing.json: of one picture, or by the name of an input
    artifacts: list[ArtifactResult]


def task(model: Model) -> dict[str, Any]:
    stage = _stage(model, "summary", "accuracy", judged_artifacts(model))
    return stage.task(doc="accuracy.json and accuracy.svg: every artifact against the reference, with the gate results")


def task_of_precisions(model: Model) -> dict[str, Any]:
    artifacts = [artifact for artifact in judged_artifacts(model) if artifact.format in ("torchscript", "onnx")]
    others = [precision for precision in REDUCED_PRECISIONS if precision != model.precision("onnx")]
    artifacts += [JudgedArtifact("graph", precision, model.graph_file(precision)) for precision in others]
    stage = _stage(model, "compare", "precisions", artifacts)
    return stage.task(doc=f"precisions.json and precisions.svg: the accuracy of {', '.join(REDUCED_PRECISIONS)} graphs")


def _stage(model: Model, name: str, file: str, artifacts: list[JudgedArtifact]) -> Stage:
    # What another machine compiled and measured. It is shown, but doit cannot build it here.
    foreign = [a.file for a in artifacts if machine_bound.missing_requirements(model, a.file)]
    return Stage(
        name=f"{name}:{model.name}",
        model=model,
        build=build,
        inputs={
            "preprocessing": model.artifact("preprocessing.json"),
            "reference": model.artifact("reference.json"),
            **{a.file: measured_file(model, a.file) for a in artifacts if a.file not in foreign},
        },
        external_inputs={file: measured_file(model, file) for file in foreign},
        outputs={"json": model.artifact(f"{file}.json"), "picture": model.artifact(f"{file}.svg")},
        settings={
            "model": model.name,
            "reference": f"{model.reference} fp32",
            "samples": model.spec.accuracy.samples
            or accuracy_samples.samples_source(model)
            or accuracy_samples.RANDOM_SAMPLES,
            "artifacts": [[*artifact] for artifact in artifacts],
            "gates": [gate.settings_of(model, artifact.format, artifact.precision) for artifact in artifacts],
        },
        tools=("matplotlib",),
        modules=(
            __name__,
            "build_tasks.figures",
            "build_tasks.tensors",
            "build_tasks.text_table",
            "build_tasks.verification.accuracy_samples",
            "build_tasks.verification.judged_artifacts",
            *gate.GATE_MODULES,
        ),
        missing_requirements=missing_requirements,
        names_model=True,
    )


def missing_requirements() -> str | None:
    """The package that is missing, None if it is installed.

    requirements-engine.txt has no matplotlib: it would install Pillow, and another version may decode other pixels.
    """
    return None if installed_version("matplotlib") else "the package matplotlib (pip install -r requirements.txt)"


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    results: list[ArtifactResult] = []
    for parts, gate_settings in zip(settings["artifacts"], settings["gates"], strict=True):
        artifact = JudgedArtifact(*parts)
        measured: MeasuredFile = read_json(inputs[artifact.file])
        if measured["reference"] == digest(inputs["reference"]):  # else another machine measured with other samples
            results.append(judge(artifact, measured, gate_settings))
    count, distinct = (results[0]["samples"], results[0]["distinct"]) if results else (0, 0)
    summary: Summary = {
        "model": settings["model"],
        "samples": {"source": settings["samples"], "count": count, "distinct": distinct},
        "preprocessing": read_json(inputs["preprocessing"]),
        "artifacts": results,
    }
    write_json(outputs["json"], summary)
    draw(summary, outputs["picture"], settings["reference"])
    return {"picture": os.path.basename(outputs["picture"]), "table": summary_table(summary, settings["reference"])}


def summary_table(summary: Summary, reference: str) -> Table:
    """The summary as a table, with a line about the samples and the preprocessing.

    Args:
        reference: The title of the first row, which shows the sensitivity of the reference itself.
    """
    several = len({name for row in summary["artifacts"] for name in row["outputs"]}) > 1
    with_truth = any("truth" in output for row in summary["artifacts"] for output in row["outputs"].values())
    columns = ["artifact", "relative L2", "limit", "cosine", "SNR", "max abs", "top-1", "top-5"]
    columns += ["top-1 accuracy", "top-5 accuracy"] if with_truth else []
    rows: list[list[str]] = []
    for row in summary["artifacts"]:
        for name, output in row["outputs"].items():
            title = f"{row['artifact']} {name}" if several else row["artifact"]
            if row is summary["artifacts"][0] and "wrong" not in output:
                # The reference itself: the change of its outputs when its inputs are perturbed by one ulp.
                sensitivity = gate.format_metric("relative_l2", output["sensitivity"])
                accuracy = _accuracy_cells(output, "reference") if with_truth else []
                title_of_reference = title.replace(row["artifact"], reference)
                rows.append([title_of_reference, sensitivity, *"-" * 6, *accuracy, "perturbed by one ulp"])
            accuracy = _accuracy_cells(output, "artifact") if with_truth else []
            rows.append([title, *_metric_cells(output), *accuracy, row["status"]])
    counts = summary["samples"]
    repeated = f" ({counts['distinct']} distinct)" if counts["distinct"] != counts["count"] else ""
    settings = summary["preprocessing"]
    pictures = {"": settings} if isinstance(settings.get("steps"), list) else settings
    if counts["source"] == accuracy_samples.RANDOM_SAMPLES:
        pictures = {}
    preprocessing = "".join(f", {_format_preprocessing(*each)}" for each in pictures.items())
    samples = f"{counts['count']} samples of {counts['source']}{repeated}{preprocessing}{_confidence(summary)}"
    return Table([*columns, "gate result"], rows, left=("gate result",), below=f"{samples}{_gpus(summary)}")


def _format_preprocessing(name: str, steps: dict[str, Any]) -> str:
    _, height, width = steps["input_size"]
    return (
        f"{name} {height} x {width}, {steps['interpolation']}, {steps['crop_mode']} crop {steps['crop_pct']}, "
        f"mean {_format_channels(steps['mean'])}, std {_format_channels(steps['std'])}".lstrip()
    )


def _metric_cells(output: JudgedOutput) -> list[str]:
    if "wrong" in output:
        return [output["wrong"], *"-" * 6]
    limits = output["limits"]
    agreements = [output["agreement"].get(metric) for metric in ("top1", "top5")]
    return [
        gate.format_metric("relative_l2", output["relative_l2"]),
        gate.format_metric("relative_l2", limits["relative_l2"]),
        gate.format_metric("cosine", output["cosine"]),
        gate.format_metric("snr", output["snr"]),
        gate.format_metric("max_absolute", output["max_absolute"]),
        *(f"{agreement['hits']} of {agreement['of']}" if agreement else "-" for agreement in agreements),
    ]


def _accuracy_cells(output: JudgedOutput, source: Literal["reference", "artifact"]) -> list[str]:
    """The numbers of samples that the reference or the artifact puts into their true class: top-1 and top-5."""
    if (truth := output.get("truth")) is None:
        return ["-", "-"]
    if source == "reference":
        counts = truth["reference_top1"], truth["reference_top5"]
    else:
        counts = truth["artifact_top1"], truth["artifact_top5"]
    return [f"{count} of {truth['labeled']}" for count in counts]


def _confidence(summary: Summary) -> str:
    """The share of all images that agreement on every sample proves, as text. With few samples it is low."""
    for row in summary["artifacts"]:
        for output in row["outputs"].values():
            if "top1" in output.get("agreement", {}):
                count = output["samples"]
                return f"; {count} of {count} prove at least {wilson_lower_bound(count, count):.0%} (95 % confidence)"
    return ""


def _gpus(summary: Summary) -> str:
    """The artifacts that were measured on a GPU, as text; empty if there are none."""
    devices = {row["artifact"]: row["device"] for row in summary["artifacts"] if not row["device"].startswith("CPU")}
    return "".join(f"; {artifact} on {device}" for artifact, device in devices.items())


def _format_channels(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in (values if len({*values}) > 1 else values[:1]))


def draw(summary: Summary, path: str, reference: str) -> None:
    """Draw the error of every sample by artifact, with the error of all samples and the limit."""
    from build_tasks.figures import pyplot, save_svg

    columns = [
        (row, output) for row in summary["artifacts"] for output in row["outputs"].values() if "wrong" not in output
    ]
    not_finite = [row["artifact"] for row in summary["artifacts"] if any("wrong" in o for o in row["outputs"].values())]
    figure, axes = pyplot(summary["model"]).subplots(
        figsize=(max(4.0, 1.3 * len(columns) + 1.5), 3.8), layout="constrained"
    )
    colors = {"ok": "#2a7f62", "not testable": "#b8860b", "refused": "#b3261e"}
    for x, (row, output) in enumerate(columns):
        color = colors[row["status"]]
        errors = [max(error, 1e-9) for error in output["errors"]]
        spread = [x + 0.5 * (index / max(len(errors) - 1, 1) - 0.5) for index in range(len(errors))]
        axes.scatter(spread, errors, s=14, color=color, alpha=0.6, linewidths=0)
        ends = (x - 0.38, x + 0.38)
        axes.hlines(max(output["relative_l2"], 1e-9), *ends, color=color)
        axes.hlines(output["limits"]["relative_l2"], *ends, color="#444444", linestyles="dashed")
    axes.set_yscale("log")
    axes.set_xticks(range(len(columns)), [f"{row['artifact']}\n{row['status']}" for row, _ in columns])
    axes.set_ylabel("relative L2 error, by sample and of all")
    title = f"{summary['model']}: {summary['samples']['count']} samples against {reference} (dashed: the limit)"
    axes.set_title(title + (f"\nNaN or infinity: {', '.join(not_finite)}" if not_finite else ""), fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    save_svg(figure, path)
