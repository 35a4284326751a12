"""summary: every artifact of a model side by side -> accuracy.json for machines, accuracy.svg for people

    model.*.measured.json ─► figures, limits, verdicts ─► a table on the terminal, accuracy.json, accuracy.svg

and compare, on demand: the same for every precision that a graph can have -> precisions.json, precisions.svg. What the
gate refuses is in both of them.
"""

import json
import os
from typing import Any, NamedTuple

from build_tasks import gate, machine, pictures
from build_tasks.digests import digest
from build_tasks.spec import CONVERTED, Model
from build_tasks.stage import Notes, Paths, Settings, Stage, code_of, installed_version
from build_tasks.tables import table

TITLES = {"torchscript": "TorchScript", "onnx": "ONNX", "graph": "graph", "tensorrt": "plan"}


class Artifact(NamedTuple):
    format: str
    precision: str
    file: str

    @property
    def title(self) -> str:
        exact = self.format in ("torchscript", "onnx") and self.precision == "fp32"
        return TITLES[self.format] if exact else f"{self.precision} {TITLES[self.format]}"


def served(model: Model) -> list[Artifact]:
    """What is judged in this model's chain, as far as it is or can be measured here."""
    precision = model.spec.engine.precision
    found = [
        Artifact(format, model.precision(format), *model.files(format))
        for format in model.served
        if format != "tensorrt"
    ]
    if model.graph_apart:
        found.append(Artifact("graph", precision, model.graph))
    for plan, capability in model.plans.items() if "tensorrt" in model.spec.formats else ():
        if os.path.exists(figures(model, plan)) or not machine.lacking(capability):
            found.append(Artifact("tensorrt", precision, plan))
    return found


def figures(model: Model, file: str) -> str:
    return model.artifact(f"{file}.measured.json")


def task(model: Model) -> dict[str, Any]:
    stage = _stage(model, "summary", "accuracy", served(model))
    return stage.task(doc="accuracy.json and accuracy.svg: every artifact beside the reference, and the verdicts")


def task_of_precisions(model: Model) -> dict[str, Any]:
    artifacts = [artifact for artifact in served(model) if artifact.format in ("torchscript", "onnx")]
    artifacts += [Artifact("graph", precision, model.graph_in(precision)) for precision in CONVERTED]
    stage = _stage(model, "compare", "precisions", artifacts)
    return stage.task(doc=f"precisions.json and precisions.svg: what {', '.join(CONVERTED)} would cost")


def _stage(model: Model, name: str, file: str, artifacts: list[Artifact]) -> Stage:
    # Plans that another machine has measured: they are shown, but nothing waits for them here.
    foreign = [a.file for a in artifacts if a.format == "tensorrt" and machine.lacking(model.plans[a.file])]
    return Stage(
        name=f"{name}:{model.name}",
        model=model,
        build=build,
        inputs={
            "preprocessing": model.artifact("preprocessing.json"),
            "reference": model.artifact("reference.json"),
            **{a.file: figures(model, a.file) for a in artifacts if a.file not in foreign},
        },
        elsewhere={file: figures(model, file) for file in foreign},
        outputs={"json": model.artifact(f"{file}.json"), "picture": model.artifact(f"{file}.svg")},
        settings={
            "model": model.name,
            "reference": f"{model.reference} fp32",
            "samples": model.spec.accuracy.samples or pictures.SHIPPED,
            "artifacts": [[*artifact] for artifact in artifacts],
            "gates": [gate.settings_of(model, artifact.format, artifact.precision) for artifact in artifacts],
        },
        tools=("matplotlib",),
        code=code_of("summary", "gate", "compare", "tables"),
        lacking=lacking,
    )


def lacking() -> str | None:
    """Where engines are built there need be no matplotlib: it would bring along a Pillow that decodes other pixels."""
    return None if installed_version("matplotlib") else "the package matplotlib (pip install -r requirements.txt)"


def build(inputs: Paths, outputs: Paths, settings: Settings) -> Notes:
    with open(inputs["preprocessing"], encoding="utf-8") as file:
        preprocessing = json.load(file)
    rows = []
    for parts, rule in zip(settings["artifacts"], settings["gates"], strict=True):
        artifact = Artifact(*parts)
        with open(inputs[artifact.file], encoding="utf-8") as file:
            measured = json.load(file)
        if measured["reference"] == digest(inputs["reference"]):  # else it is of another machine, and of other samples
            rows.append(judged(artifact, measured, rule))
    first = rows[0] if rows else {"samples": 0, "distinct": 0}
    summary = {
        "model": settings["model"],
        "samples": {"source": settings["samples"], "count": first["samples"], "distinct": first["distinct"]},
        "preprocessing": preprocessing,
        "artifacts": rows,
    }
    with open(outputs["json"], "w", encoding="utf-8") as file:
        json.dump(summary, file, indent=1, allow_nan=False)
    draw(summary, outputs["picture"], settings["reference"])
    return {"picture": os.path.basename(outputs["picture"]), "table": told(summary, settings["reference"])}


def judged(artifact: Artifact, measured: dict[str, Any], rule: Settings) -> dict[str, Any]:
    """One artifact's part of the summary: its figures by output, their limits, and the verdict."""
    refusal = gate.refusal(measured, rule, advice="")
    doubt = gate.doubt(measured, rule)
    outputs = {}
    for name, output in measured["outputs"].items():
        outputs[name] = output if "wrong" in output else _judged(name, output, rule)
    return {
        "artifact": artifact.title,
        "file": artifact.file,
        "format": artifact.format,
        "precision": artifact.precision,
        "status": "refused" if refusal else "not testable" if doubt else "ok",
        "reason": refusal or doubt,
        "samples": measured["samples"],
        "distinct": measured["distinct"],
        "outputs": outputs,
    }


def _judged(name: str, output: dict[str, Any], rule: Settings) -> dict[str, Any]:
    limits = gate.limits(name, output, rule)
    found = gate.values(output, gate.window(limits, output, rule))
    proven = {}
    for metric in ("top1", "top5"):
        if metric in found:
            hits = round(found[metric] * output["samples"])
            proven[metric] = {"hits": hits, "of": output["samples"], "at_least": gate.at_least(hits, output["samples"])}
    return {**output, **found, "limits": limits, "agreement": proven}


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
                moved = gate.figure("relative_l2", output["sensitivity"])
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
    return f"{table([*columns, 'verdict'], rows)}\n{count} samples of {source}{twice}, {how}{bound}"


def _cells(output: dict[str, Any]) -> list[str]:
    if "wrong" in output:
        return [output["wrong"], *"-" * 6]
    limits = output["limits"]
    figures = [gate.figure(metric, output[metric]) for metric in ("cosine", "snr", "max_absolute")]
    shares = [output["agreement"].get(metric) for metric in ("top1", "top5")]
    return [
        gate.figure("relative_l2", output["relative_l2"]),
        gate.figure("relative_l2", limits["relative_l2"]),
        *figures,
        *(f"{share['hits']} of {share['of']}" if share else "-" for share in shares),
    ]


def _accuracy(output: dict[str, Any], who: str) -> list[str]:
    if (truth := output.get("truth")) is None:
        return ["-", "-"]
    return [f"{truth[f'{who}_{best}']} of {truth['labelled']}" for best in ("top1", "top5")]


def _bound(summary: dict[str, Any]) -> str:
    """What full agreement of that many samples proves, which of a few is little."""
    for row in summary["artifacts"]:
        for output in row["outputs"].values():
            if "top1" in output.get("agreement", {}):
                count = output["samples"]
                return f"; {count} of {count} prove at least {gate.at_least(count, count):.0%} (95 % confidence)"
    return ""


def _some(values: list[float]) -> str:
    return " ".join(f"{value:.3g}" for value in (values if len({*values}) > 1 else values[:1]))


def pyplot(salt: str) -> Any:
    """matplotlib's pyplot, for a picture of the same bytes for the same figures. salt: of the names inside."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": salt, "svg.fonttype": "none", "font.size": 9}
    from matplotlib import pyplot

    return pyplot


def save(figure: Any, path: str) -> None:
    """Such a picture, without the time and the version that made it; closed then."""
    from matplotlib import pyplot

    figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


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
    save(figure, path)
