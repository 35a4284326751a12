"""summary: every artifact of a model side by side -> accuracy.json for machines, accuracy.svg for people

    model.*.measured.json ─► figures, limits, verdicts ─► a table on the terminal, accuracy.json, accuracy.svg

and compare, on demand: the same for every precision that a graph can have -> precisions.json, precisions.svg. What the
gate refuses is in both of them.
"""

import os
from typing import Any

from build_tasks.figures import pyplot, save_svg
from build_tasks.json_files import read_json, write_json
from build_tasks.runtime import hardware
from build_tasks.runtime.digests import digest
from build_tasks.runtime.distributions import installed_version
from build_tasks.runtime.stage import Notes, Paths, Settings, Stage
from build_tasks.spec.model import Model
from build_tasks.spec.tables import REDUCED_PRECISIONS
from build_tasks.text_table import format_table
from build_tasks.verification import accuracy_samples, gate
from build_tasks.verification.judged_artifacts import JudgedArtifact, judge, judged_artifacts, measured_file


def task(model: Model) -> dict[str, Any]:
    stage = _stage(model, "summary", "accuracy", judged_artifacts(model))
    return stage.task(doc="accuracy.json and accuracy.svg: every artifact beside the reference, and the verdicts")


def task_of_precisions(model: Model) -> dict[str, Any]:
    artifacts = [artifact for artifact in judged_artifacts(model) if artifact.format in ("torchscript", "onnx")]
    artifacts += [JudgedArtifact("graph", precision, model.graph_file(precision)) for precision in REDUCED_PRECISIONS]
    stage = _stage(model, "compare", "precisions", artifacts)
    return stage.task(doc=f"precisions.json and precisions.svg: what {', '.join(REDUCED_PRECISIONS)} would cost")


def _stage(model: Model, name: str, file: str, artifacts: list[JudgedArtifact]) -> Stage:
    # Plans that another machine has measured: they are shown, but nothing waits for them here.
    foreign = [
        a.file for a in artifacts if a.format == "tensorrt" and hardware.missing_requirements(model.plans[a.file])
    ]
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
            "samples": model.spec.accuracy.samples or accuracy_samples.SHIPPED_PHOTOGRAPHS,
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
    )


def missing_requirements() -> str | None:
    """Where engines are built there need be no matplotlib: it would bring along a Pillow that decodes other pixels."""
    return None if installed_version("matplotlib") else "the package matplotlib (pip install -r requirements.txt)"


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    preprocessing = read_json(inputs["preprocessing"])
    rows = []
    for parts, rule in zip(settings["artifacts"], settings["gates"], strict=True):
        artifact = JudgedArtifact(*parts)
        measured = read_json(inputs[artifact.file])
        if measured["reference"] == digest(inputs["reference"]):  # else it is of another machine, and of other samples
            rows.append(judge(artifact, measured, rule))
    first = rows[0] if rows else {"samples": 0, "distinct": 0}
    summary = {
        "model": settings["model"],
        "samples": {"source": settings["samples"], "count": first["samples"], "distinct": first["distinct"]},
        "preprocessing": preprocessing,
        "artifacts": rows,
    }
    write_json(outputs["json"], summary)
    draw(summary, outputs["picture"], settings["reference"])
    return {"picture": os.path.basename(outputs["picture"]), "table": told(summary, settings["reference"])}


def told(summary: dict[str, Any], reference: str) -> str:
    """The summary as a table, and what it was measured on; reference: what its first row is of."""
    several = len({name for row in summary["artifacts"] for name in row["outputs"]}) > 1
    known = any("truth" in output for row in summary["artifacts"] for output in row["outputs"].values())
    columns = ["artifact", "relative L2", "limit", "cosine", "SNR", "max abs", "top-1", "top-5"]
    columns += ["top-1 accuracy", "top-5 accuracy"] if known else []
    rows: list[list[str]] = []
    for row in summary["artifacts"]:
        for name, output in row["outputs"].items():
            title = f"{row['artifact']} {name}" if several else row["artifact"]
            if row is summary["artifacts"][0] and "wrong" not in output:
                # the network itself, told with how far its outputs move with an ulp of its inputs
                moved = gate.format_metric("relative_l2", output["sensitivity"])
                accuracy = _accuracy(output, "reference") if known else []
                rows.append([title.replace(row["artifact"], reference), moved, *"-" * 6, *accuracy, "an ulp off"])
            rows.append([title, *_cells(output), *(_accuracy(output, "artifact") if known else ()), row["status"]])
    source, count, distinct = (summary["samples"][key] for key in ("source", "count", "distinct"))
    twice = f" ({distinct} distinct)" if distinct != count else ""
    steps = summary["preprocessing"]
    how = (
        f"{steps['input_size'][1]} x {steps['input_size'][2]}, {steps['interpolation']}, {steps['crop_mode']} crop "
        f"{steps['crop_pct']}, mean {_some(steps['mean'])}, std {_some(steps['std'])}"
    )
    bound = _bound(summary)
    return f"{format_table([*columns, 'verdict'], rows)}\n{count} samples of {source}{twice}, {how}{bound}"


def _cells(output: dict[str, Any]) -> list[str]:
    if "wrong" in output:
        return [output["wrong"], *"-" * 6]
    limits = output["limits"]
    figures = [gate.format_metric(metric, output[metric]) for metric in ("cosine", "snr", "max_absolute")]
    shares = [output["agreement"].get(metric) for metric in ("top1", "top5")]
    return [
        gate.format_metric("relative_l2", output["relative_l2"]),
        gate.format_metric("relative_l2", limits["relative_l2"]),
        *figures,
        *(f"{share['hits']} of {share['of']}" if share else "-" for share in shares),
    ]


def _accuracy(output: dict[str, Any], who: str) -> list[str]:
    if (truth := output.get("truth")) is None:
        return ["-", "-"]
    return [f"{truth[f'{who}_{best}']} of {truth['labeled']}" for best in ("top1", "top5")]


def _bound(summary: dict[str, Any]) -> str:
    """What full agreement of that many samples proves, which of a few is little."""
    for row in summary["artifacts"]:
        for output in row["outputs"].values():
            if "top1" in output.get("agreement", {}):
                count = output["samples"]
                return (
                    f"; {count} of {count} prove at least {gate.wilson_lower_bound(count, count):.0%} (95 % confidence)"
                )
    return ""


def _some(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in (values if len({*values}) > 1 else values[:1]))


def draw(summary: dict[str, Any], path: str, reference: str) -> None:
    """The error of every sample by artifact, with its limit."""
    bars = [
        (row, output) for row in summary["artifacts"] for output in row["outputs"].values() if "wrong" not in output
    ]
    missing = [row["artifact"] for row in summary["artifacts"] if any("wrong" in o for o in row["outputs"].values())]
    figure, axes = pyplot(summary["model"]).subplots(
        figsize=(max(4.0, 1.3 * len(bars) + 1.5), 3.8), layout="constrained"
    )
    colours = {"ok": "#2a7f62", "not testable": "#b8860b", "refused": "#b3261e"}
    for place, (row, output) in enumerate(bars):
        colour = colours[row["status"]]
        errors = [max(error, 1e-9) for error in output["errors"]]
        spread = [place + 0.5 * (index / max(len(errors) - 1, 1) - 0.5) for index in range(len(errors))]
        axes.scatter(spread, errors, s=14, color=colour, alpha=0.6, linewidths=0)
        ends = (place - 0.38, place + 0.38)
        axes.hlines(max(output["relative_l2"], 1e-9), *ends, color=colour)
        axes.hlines(output["limits"]["relative_l2"], *ends, color="#444444", linestyles="dashed")
    axes.set_yscale("log")
    axes.set_xticks(range(len(bars)), [f"{row['artifact']}\n{row['status']}" for row, _ in bars])
    axes.set_ylabel("relative L2 error, by sample and of all")
    title = f"{summary['model']}: {summary['samples']['count']} samples against {reference} (dashed: the limit)"
    axes.set_title(title + (f"\nNaN or infinity: {', '.join(missing)}" if missing else ""), fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    save_svg(figure, path)
