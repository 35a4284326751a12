"""The accuracy gate: the limits of each metric, and the check whether an artifact is within them (see metrics.py).

    precision, sensitivity of the model ─► default limits ─┐
    [[accuracy.gate]] of the spec ─────────────────────────┴► limits ─┐
    model.*.measured.json ──────────────────────────► metric_values ──┴► failures ─► gate_error

A rule of the spec replaces default limits:

    [[accuracy.gate]]
    precision = "int8"      # without this key: for all precisions (the same with format and output)
    top1 = 0.9

Later rules win over earlier ones. This module computes with plain data and imports nothing heavy.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypedDict

from build_tasks.errors import UserError
from build_tasks.runtime.stage import Settings
from build_tasks.spec.model import Model, table_settings
from build_tasks.spec.tables import QUANTIZED_PRECISIONS
from build_tasks.verification.batch_check import format_difference
from build_tasks.verification.metrics import ClassChange, Measurements, OutputFigures
from build_tasks.verification.tolerance import ROUNDOFF, tolerance

# The modules of the project that affect the gate result, for the fingerprint of the stages that use it.
GATE_MODULES = (
    "build_tasks.tensors",
    "build_tasks.verification.batch_check",
    "build_tasks.verification.gate",
    "build_tasks.verification.metrics",
    "build_tasks.verification.tolerance",
)

# The metrics that have a limit, with their names in messages. relative_l2, max_absolute, cosine and snr are computed by
# Polygraphy.
AT_MOST = {
    "relative_l2": "relative L2 error",
    "max_absolute": "maximal absolute error",
    "top1_drop": "loss of top-1 accuracy",
    "top5_drop": "loss of top-5 accuracy",
}
AT_LEAST = {
    "cosine": "cosine similarity",
    "snr": "signal-to-noise ratio",
    "top1": "top-1 agreement",
    "top5": "top-5 agreement",
}
METRICS = {**AT_MOST, **AT_LEAST}
SHARES = ("top1", "top5", "top1_drop", "top5_drop")

MIN_DISTINCT_SAMPLES = 5  # fewer samples prove nothing
MIN_SPREAD = 1e-3  # if an output differs between samples by less than this share, the comparison proves nothing
OUTLIER_FACTOR = 4  # a single value may be wrong by OUTLIER_FACTOR x tolerance x the largest value of the output

# By a missing key of the figures: the reason why a rule cannot be applied to an output.
MISSING_FIGURES = {
    "truth": "it needs accuracy.truth, the class that each sample shows, and an output with classes",
    "top1_changes": "the output holds no classes: labels, [output] or a rule with `output` say which one does",
}


class GateResult(TypedDict):
    """The content of model.*.verdict.json. The file exists only for artifacts that pass."""

    model: str | None  # digest of the artifact
    signature: str | None  # digest of its signature
    status: str  # as `status` returns it


class Failure(NamedTuple):
    """A metric of one output whose value is beyond its limit."""

    output: str
    metric: str
    message: str  # the metric's value, its limit, and the sample where it is worst


def rules(model: Model, model_format: str, precision: str) -> list[dict[str, Any]]:
    """Return the spec's rules for an artifact, in their order.

    Each is a dict of limits, with the key `output` if it is for one output only.
    """
    formats = {None, model_format}
    if model_format == "onnx" and model.spec.has_engine and not model.graph_gated_separately:
        formats.add("graph")  # engines are compiled from model.onnx itself
    tables = [table_settings(rule) for rule in model.spec.accuracy.gate]
    matching = [r for r in tables if r.pop("format") in formats and r.pop("precision") in (None, precision)]
    return [{key: value for key, value in rule.items() if value is not None} for rule in matching]


def settings_of(model: Model, model_format: str, precision: str) -> Settings:
    """Return the settings that affect the gate result, for the fingerprint and for `gate_error`."""
    return {
        "format": model_format,
        "precision": precision,
        "gate": rules(model, model_format, precision),
        "allow_untestable": model.spec.accuracy.allow_untestable,
        "random_weights": model.seed is not None,
        **({"random_samples": True} if model.spec.inputs and not model.spec.accuracy.samples else {}),
    }


def arithmetic(output: OutputFigures, settings: Settings) -> str:
    """Return the precision whose rounding the figures contain: that of the artifact, or TF32 for its fp32 on a GPU."""
    precision: str = settings["precision"]
    return output.get("arithmetic", precision) if precision == "fp32" else precision


def limits(name: str, output: OutputFigures, settings: Settings) -> dict[str, float]:
    """Return the limits of an output by metric, in the order in which they are checked.

    The defaults are:

    - the relative L2 error, by precision and sensitivity;
    - the absolute error of a single value: OUTLIER_FACTOR times that limit, relative to the output's largest value, so
      that one bad sample among many fails the gate;
    - agreement of the classes: for every sample, and in int8 and fp8 for 99 % of the samples;
    - instead of that agreement, a loss of accuracy of at most one percentage point, if the class of every sample is
      known and the reference recognizes at least half of the samples.

    The classes of random samples mean nothing, and have no default limit.
    """
    precision = arithmetic(output, settings)
    overrides: dict[str, float] = {}
    for rule in settings["gate"]:
        if rule.get("output", name) == name:
            overrides |= {metric: limit for metric, limit in rule.items() if metric != "output"}
    default = {"relative_l2": overrides.get("relative_l2", tolerance(precision, output["sensitivity"]))}
    if precision not in QUANTIZED_PRECISIONS:
        default["max_absolute"] = OUTLIER_FACTOR * default["relative_l2"] * output["largest"]
    if "top1_changes" in output and not settings.get("random_samples"):
        truth = output.get("truth")
        if truth and truth["labeled"] == output["samples"] <= 2 * truth["reference_top1"]:
            default |= {"top1_drop": 0.01}
        else:
            default |= dict.fromkeys(("top1", "top5"), 0.99 if precision in QUANTIZED_PRECISIONS else 1.0)
    return {**default, **overrides}


def metric_values(output: OutputFigures, tie: float) -> dict[str, float]:
    """Return the value of each metric for one output, by the name of the metric.

    Args:
        output: Its figures.
        tie: The largest difference between two scores that counts as a tie, as a multiple of the RMS of the sample's
            values in the reference. A sample agrees in top-1 if the reference's score of the artifact's strongest class
            is at most this far below the reference's best score.
    """
    values = {
        "relative_l2": output["relative_l2"],
        "cosine": output["cosine"],
        "snr": output["snr"],
        "max_absolute": output["max_absolute"],
    }
    if "top1_changes" in output:
        values["top1"] = 1 - len(_changes_beyond(output, tie)) / output["samples"]
        values["top5"] = 1 - len(output["top5_losses"]) / output["samples"]
    if truth := output.get("truth"):
        values["top1_drop"] = (truth["reference_top1"] - truth["artifact_top1"]) / truth["labeled"]
        values["top5_drop"] = (truth["reference_top5"] - truth["artifact_top5"]) / truth["labeled"]
    return values


def tie_tolerance(output_limits: dict[str, float], output: OutputFigures, settings: Settings) -> float:
    """Return the margin up to which two classes count as a tie, in RMS of the sample's values.

    It is the error that rounding may cause. For int8 and fp8 the margin of bf16 is used.
    """
    if arithmetic(output, settings) in ROUNDOFF:
        return output_limits["relative_l2"]
    return tolerance("bf16", output["sensitivity"])


def _changes_beyond(output: OutputFigures, tie: float) -> list[ClassChange]:
    return [change for change in output["top1_changes"] if change["margin"] > tie]


def failures(outputs: dict[str, OutputFigures], settings: Settings) -> Iterator[Failure]:
    """Yield each metric whose value is beyond its limit, and outputs that are another in another batch.

    The answers to one sample may differ between batches by OUTLIER_FACTOR times the tie tolerance, since kernels of
    other batch sizes round in another way.

    Raises:
        UserError: If a rule names an output that does not exist, or a metric that its outputs do not have.
    """
    check_rules(outputs, settings["gate"])
    for name, output in outputs.items():
        if "wrong" in output:
            yield Failure(name, "wrong", output["wrong"])
            continue
        output_limits = limits(name, output, settings)
        tie = tie_tolerance(output_limits, output, settings)
        batch_limit = OUTLIER_FACTOR * tie
        if "worst_batch" in output and output["worst_batch"]["difference"] > batch_limit:
            yield Failure(name, "batch", format_difference(output["worst_batch"], batch_limit))
        values = metric_values(output, tie)
        for metric, limit in output_limits.items():
            if metric not in values:
                continue  # the output has no classes
            beyond = values[metric] < limit if metric in AT_LEAST else values[metric] > limit
            if beyond or math.isnan(values[metric]):
                message = f"{METRICS[metric]} {format_metric(metric, values[metric])}"
                message += f", limit {format_metric(metric, limit)}{_format_worst(metric, output, tie)}"
                yield Failure(name, metric, message)


def check_rules(outputs: dict[str, OutputFigures], gate_rules: list[dict[str, Any]]) -> None:
    """Raise UserError for a rule on an output that does not exist, or on a metric that none of its outputs has."""
    for rule in gate_rules:
        if rule.get("output", next(iter(outputs))) not in outputs:
            raise UserError(f"accuracy.gate: there is no output {rule['output']!r}, only {', '.join(outputs)}")
        meant = [output for name, output in outputs.items() if rule.get("output", name) == name]
        for metric in rule.keys() - {"output"}:
            key = "truth" if metric.endswith("drop") else "top1_changes" if metric in SHARES else "norm"
            if not any(key in output or "wrong" in output for output in meant):
                name = rule.get("output", "every output")
                raise UserError(f"accuracy.gate: {metric} of {name}: {MISSING_FIGURES[key]}")


def _format_worst(metric: str, output: OutputFigures, tie: float) -> str:
    """The end of a failure's message: the sample where the metric is worst, or the number of recognized samples."""
    if metric in output["worst"]:
        return f", worst at {output['worst'][metric]}"
    if metric == "top1":
        change = max(_changes_beyond(output, tie), key=lambda change: change["margin"])
        classes = f"class {change['artifact_class']} for {change['reference_class']}"
        return f", worst at {change['sample']}: {classes}, which leads by {change['margin']:.2g} RMS"
    if metric == "top5":
        return f", for example at {output['top5_losses'][0]}"
    truth = output["truth"]
    if metric == "top1_drop":
        return f", {truth['artifact_top1']} of {truth['labeled']} for {truth['reference_top1']}"
    return f", {truth['artifact_top5']} of {truth['labeled']} for {truth['reference_top5']}"


def format_metric(metric: str, value: float) -> str:
    """Format the value of a metric for messages."""
    if metric in SHARES:
        return f"{value:.1%}".replace(".0%", "%")
    if metric == "snr":
        return f"{value:.1f} dB"
    return f"{value:.6g}" if metric == "cosine" else f"{value:.1e}"


def untestable_reason(measured: Measurements, settings: Settings) -> str | None:
    """Return the reason why agreement with this reference proves nothing. None if it proves something."""
    if settings["random_weights"]:
        return "random weights"
    if settings.get("random_samples") and settings["precision"] in QUANTIZED_PRECISIONS:
        return f"random samples, on which {settings['precision']} may lose more or less than on real ones"
    if (count := measured["distinct"]) < MIN_DISTINCT_SAMPLES:
        return f"{count} distinct sample{'s' if count > 1 else ''}, and at least {MIN_DISTINCT_SAMPLES} are needed"
    outputs = measured["outputs"]
    reasons = untestable_outputs(outputs, settings)
    return next(iter(reasons.values())) if reasons and len(reasons) == len(outputs) else None


def untestable_outputs(outputs: dict[str, OutputFigures], settings: Settings) -> dict[str, str]:
    """Return the outputs that agree with any artifact, because they hardly differ between samples, and the reasons."""
    reasons = {}
    for name, output in outputs.items():
        if "wrong" in output:
            continue
        allowed = tolerance(arithmetic(output, settings), output["sensitivity"])
        if output["spread"] < MIN_SPREAD:
            reasons[name] = f"output {name} is the same for all samples (spread {output['spread']:.0e})"
        elif settings["precision"] in ROUNDOFF and output["spread"] < allowed:
            reasons[name] = (
                f"output {name} differs between the samples by {output['spread']:.1e}, "
                f"less than it may be wrong by ({allowed:.1e})"
            )
    return reasons


def status(measured: Measurements, settings: Settings) -> str:
    """Return the status of an artifact that passes: "ok", "ok on random samples", "ok, except …", "not testable: …"."""
    if reason := untestable_reason(measured, settings):
        return f"not testable: {reason}"
    reasons = untestable_outputs(measured["outputs"], settings)
    ok = "ok on random samples" if settings.get("random_samples") else "ok"
    return f"{ok}, except that {'; '.join(reasons.values())}" if reasons else ok


def gate_error(measured: Measurements, settings: Settings, advice: str) -> str | None:
    """Return the reason why an artifact fails the gate. None if it passes. The reason ends with `advice` if a limit is
    exceeded or an output could not be measured.

    An artifact whose samples prove nothing fails as well, unless the weights are random or the spec allows it. With
    random weights in reduced precision the limits are not applied: rounding may change the outputs by any factor. Such
    an artifact fails only if an output could not be measured.
    """
    untestable = untestable_reason(measured, settings)
    exact = all(arithmetic(output, settings) == "fp32" for output in measured["outputs"].values())
    lenient = settings["random_weights"] and not exact
    failed = [
        failure for failure in failures(measured["outputs"], settings) if failure.metric == "wrong" or not lenient
    ]
    if failed:
        first, *others = failed
        more = f" (and {len(others)} more: {_format_names(others)})" if others else ""
        return f"output {first.output}: {first.message}{more}{advice}"
    if untestable and not (settings["random_weights"] or settings["allow_untestable"]):
        return f"accuracy cannot be tested: {untestable}; choose other samples, or set accuracy.allow_untestable"
    return None


def _format_names(failed: list[Failure]) -> str:
    return ", ".join(f"{failure.metric} of {failure.output}" for failure in failed)


def nearest_limit(measured: Measurements, settings: Settings) -> tuple[str, str]:
    """Return the relative L2 error that is nearest to its limit, and this limit, both formatted for messages."""
    outputs = measured["outputs"]
    bounds = {name: limits(name, outputs[name], settings)["relative_l2"] for name in outputs}
    name = max(bounds, key=lambda name: outputs[name]["relative_l2"] / bounds[name])
    return format_metric("relative_l2", outputs[name]["relative_l2"]), format_metric("relative_l2", bounds[name])
