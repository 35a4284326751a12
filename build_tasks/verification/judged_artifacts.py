"""Which artifacts of a model are judged, and their figures with the result of the gate."""

import os
from typing import Any, NamedTuple

from build_tasks.runtime import hardware
from build_tasks.runtime.stage import Settings
from build_tasks.spec.model import Model
from build_tasks.verification import gate

TITLES = {"torchscript": "TorchScript", "onnx": "ONNX", "graph": "graph", "tensorrt": "plan"}


class JudgedArtifact(NamedTuple):
    format: str
    precision: str
    file: str

    @property
    def title(self) -> str:
        exact = self.format in ("torchscript", "onnx") and self.precision == "fp32"
        return TITLES[self.format] if exact else f"{self.precision} {TITLES[self.format]}"


def judged_artifacts(model: Model) -> list[JudgedArtifact]:
    """What is judged in this model's chain, as far as it is or can be measured here."""
    precision = model.spec.engine.precision
    found = [
        JudgedArtifact(model_format, model.precision(model_format), *model.files(model_format))
        for model_format in model.served_formats
        if model_format != "tensorrt"
    ]
    if model.graph_gated_separately:
        found.append(JudgedArtifact("graph", precision, model.graph))
    for plan, capability in model.plans.items() if "tensorrt" in model.spec.formats else ():
        if os.path.exists(measured_file(model, plan)) or not hardware.missing_requirements(capability):
            found.append(JudgedArtifact("tensorrt", precision, plan))
    return found


def measured_file(model: Model, file: str) -> str:
    return model.artifact(f"{file}.measured.json")


def judge(artifact: JudgedArtifact, measured: dict[str, Any], rule: Settings) -> dict[str, Any]:
    """One artifact's part of the summary: its figures by output, their limits, and the verdict."""
    refusal = gate.gate_error(measured, rule, advice="")
    doubt = gate.untestable_reason(measured, rule)
    outputs = {}
    for name, output in measured["outputs"].items():
        outputs[name] = output if "wrong" in output else _judge_output(name, output, rule)
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


def _judge_output(name: str, output: dict[str, Any], rule: Settings) -> dict[str, Any]:
    limits = gate.limits(name, output, rule)
    found = gate.metric_values(output, gate.tie_tolerance(limits, output, rule))
    proven = {}
    for metric in ("top1", "top5"):
        if metric in found:
            hits = round(found[metric] * output["samples"])
            proven[metric] = {
                "hits": hits,
                "of": output["samples"],
                "at_least": gate.wilson_lower_bound(hits, output["samples"]),
            }
    return {**output, **found, "limits": limits, "agreement": proven}
