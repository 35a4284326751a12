"""The artifacts of a model that the gate checks, and their figures with the gate result."""

import math
import os
from typing import NamedTuple, TypedDict, cast

from build_tasks.runtime import machine_bound
from build_tasks.runtime.stage import Settings
from build_tasks.spec.model import Model
from build_tasks.verification import gate
from build_tasks.verification.metrics import MeasuredFile, Measurements, OutputFigures

WILSON_Z = 1.645  # standard score of a one-sided confidence of 95 %

TITLES = {"torchscript": "TorchScript", "onnx": "ONNX", "graph": "graph", "tensorrt": "plan", "aoti": "AOTInductor"}
COMPILED = ("tensorrt", "aoti")  # for one kind of machine


class JudgedArtifact(NamedTuple):
    """An artifact that the gate checks."""

    format: str  # "torchscript", "onnx", "tensorrt", "aoti"; "graph" for the ONNX file that engines are compiled from
    precision: str
    file: str

    @property
    def title(self) -> str:
        """Its name in tables: "ONNX", "int8 plan"."""
        exact = self.format in ("torchscript", "onnx", "aoti") and self.precision == "fp32"
        return TITLES[self.format] if exact else f"{self.precision} {TITLES[self.format]}"


class Agreement(TypedDict):
    """The samples whose class agrees with the reference."""

    hits: int
    of: int
    at_least: float  # the share that these counts prove with 95 % confidence


class JudgedOutput(OutputFigures, total=False):
    """The figures of an output with the metrics computed from them. Without them if `wrong` is the only key."""

    top1: float
    top5: float
    top1_drop: float
    top5_drop: float
    limits: dict[str, float]  # the limit of each metric
    agreement: dict[str, Agreement]  # the keys "top1" and "top5", for outputs with classes


class ArtifactResult(TypedDict):
    """One entry of `artifacts` in accuracy.json."""

    artifact: str  # its title
    file: str
    format: str
    precision: str
    status: str  # "ok", "not testable", "refused"
    reason: str | None  # why it is not "ok"
    samples: int
    distinct: int
    device: str  # "CPU", or the name of the GPU
    outputs: dict[str, JudgedOutput]


def judged_artifacts(model: Model) -> list[JudgedArtifact]:
    """Return the artifacts of a model that are measured, or can be measured on this machine."""
    artifacts = [
        JudgedArtifact(model_format, model.precision(model_format), file)
        for model_format in sorted(model.served_formats, key=COMPILED.__contains__)
        for file in model.files(model_format)
        if os.path.exists(measured_file(model, file)) or not machine_bound.missing_requirements(model, file)
    ]
    if model.graph_gated_separately:
        first_compiled = next((i for i, each in enumerate(artifacts) if each.format in COMPILED), len(artifacts))
        artifacts.insert(first_compiled, JudgedArtifact("graph", model.spec.engine.precision, model.graph))
    return artifacts


def measured_file(model: Model, file: str) -> str:
    """Return the path of the figures of an artifact."""
    return model.artifact(f"{file}.measured.json")


def judge(artifact: JudgedArtifact, measured: MeasuredFile, rule: Settings) -> ArtifactResult:
    """Return the figures of an artifact by output, their limits, and the result of the gate."""
    error = gate.gate_error(measured, rule, advice="")
    untestable = gate.untestable_reason(measured, rule)
    return {
        "artifact": artifact.title,
        "file": artifact.file,
        "format": artifact.format,
        "precision": artifact.precision,
        "status": "refused" if error else "not testable" if untestable else "ok",
        "reason": error or untestable,
        "samples": measured["samples"],
        "distinct": measured["distinct"],
        "device": measured.get("device", "unknown"),  # a plan may have been measured by an older version
        "outputs": {name: _judge_output(name, output, rule) for name, output in measured["outputs"].items()},
    }


def format_top1(measured: Measurements, rule: Settings) -> str | None:
    """Return how many samples keep their class, "7 of 7, with 2 near ties"; None if no output has classes.

    In a near tie the artifact prefers a class that is as good as the reference's own. It is no change for the gate.
    """
    for name, output in measured["outputs"].items():
        if agreement := _judge_output(name, output, rule).get("agreement", {}).get("top1"):
            ties = agreement["hits"] - output["samples"] + len(output["top1_changes"])
            suffix = f", with {ties} near tie{'s' if ties > 1 else ''}" if ties else ""
            return f"{agreement['hits']} of {agreement['of']}{suffix}"
    return None


def _judge_output(name: str, output: OutputFigures, rule: Settings) -> JudgedOutput:
    if "wrong" in output:
        return {"wrong": output["wrong"]}
    limits = gate.limits(name, output, rule)
    values = gate.metric_values(output, gate.tie_tolerance(limits, output, rule))
    agreement: dict[str, Agreement] = {}
    for metric in ("top1", "top5"):
        if metric in values:
            hits, count = round(values[metric] * output["samples"]), output["samples"]
            agreement[metric] = {"hits": hits, "of": count, "at_least": wilson_lower_bound(hits, count)}
    return cast(JudgedOutput, {**output, **values, "limits": limits, "agreement": agreement})


def wilson_lower_bound(hits: int, count: int) -> float:
    """Return the lower bound of a true share from `hits` of `count`, with 95 % confidence, by Wilson's interval.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    z = WILSON_Z
    share = hits / count
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (center - spread) / (1 + z * z / count)
