"""The accuracy gate: what an artifact may cost, and the verdict on what was measured (see metrics.py).

Limits come from the precision and from the model's own sensitivity, until a rule of the spec says otherwise:

    [[accuracy.gate]]
    precision = "int8"      # of all precisions without it; likewise format and output
    top1 = 0.9

Later rules win over earlier ones. Plain data and arithmetic: nothing heavy is imported.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from build_tasks.errors import UserError
from build_tasks.spec.model import Model, table_settings
from build_tasks.spec.tables import QUANTIZED_PRECISIONS
from build_tasks.verification.metrics import Measured
from build_tasks.verification.tolerance import ROUNDOFF, tolerance

Settings = dict[str, Any]

# The modules of the project that decide a verdict, for the fingerprint of the stages that judge.
GATE_MODULES = (
    "build_tasks.verification.gate",
    "build_tasks.verification.metrics",
    "build_tasks.verification.tolerance",
)

# What a limit bounds, and how it is told. The first four are of Polygraphy's comparisons.
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
SHARES = ("top1", "top5", "top1_drop", "top5_drop")

FEWEST = 5  # distinct samples that say anything
DEGENERATE = 1e-3  # spread of an output over the samples, relative to its size, under which it says nothing
OUTLIER = 4  # times the tolerance, of the largest value that there is: what a single value may be off by


class Failure(NamedTuple):
    output: str
    metric: str
    told: str  # the metric's value, its limit, and where it is worst


def rules(model: Model, model_format: str, precision: str) -> list[dict[str, Any]]:
    """The spec's rules for an artifact, as a stage takes them into its fingerprint: {output, limits …}, in order."""
    formats = {None, model_format}
    if model_format == "onnx" and model.spec.has_engine and not model.graph_gated_separately:
        formats.add("graph")  # model.onnx is what is compiled, too
    found = [table_settings(rule) for rule in model.spec.accuracy.gate]
    fitting = [r for r in found if r.pop("format") in formats and r.pop("precision") in (None, precision)]
    return [{key: value for key, value in rule.items() if value is not None} for rule in fitting]


def settings_of(model: Model, model_format: str, precision: str) -> Settings:
    """What decides a verdict besides what was measured."""
    return {
        "format": model_format,
        "precision": precision,
        "gate": rules(model, model_format, precision),
        "allow_untestable": model.spec.accuracy.allow_untestable,
        "random_weights": model.seed is not None,
    }


def limits(name: str, output: Measured, settings: Settings) -> dict[str, float]:
    """The limit of each metric of an output that has one, in the order in which they are judged.

    By default: the relative L2 error by precision and sensitivity; no single value farther off than OUTLIER times that,
    for a single sample must not drown among many; and every sample's class the same (99 % of them in int8 and fp8).
    Where the class that every sample shows is known, and the network itself names it for half of them at least, it is
    accuracy that may fall, by a point.
    """
    precision = settings["precision"]
    own: dict[str, float] = {}
    for rule in settings["gate"]:
        if rule.get("output", name) == name:
            own |= {metric: limit for metric, limit in rule.items() if metric != "output"}
    default = {"relative_l2": own.get("relative_l2", tolerance(precision, output["sensitivity"]))}
    if precision not in QUANTIZED_PRECISIONS:
        default["max_absolute"] = OUTLIER * default["relative_l2"] * output["largest"]
    if "top1_changes" in output:
        truth = output.get("truth")
        if truth and truth["labeled"] == output["samples"] <= 2 * truth["reference_top1"]:
            default |= {"top1_drop": 0.01}
        else:
            default |= dict.fromkeys(("top1", "top5"), 0.99 if precision in QUANTIZED_PRECISIONS else 1.0)
    return {**default, **own}


def metric_values(output: Measured, window: float) -> dict[str, float]:
    """The figures of an output that limits bound.

    A sample agrees in its class if the class that the artifact names is the reference's strongest, or as strong as that
    but for `window` times the root mean square of the sample's outputs: which of two equals comes first is no matter
    of accuracy.
    """
    found = {metric: output[metric] for metric in ("relative_l2", "cosine", "snr", "max_absolute")}
    if "top1_changes" in output:
        found["top1"] = 1 - len(_turned(output, window)) / output["samples"]
        found["top5"] = 1 - len(output["top5_losses"]) / output["samples"]
    if truth := output.get("truth"):
        for best in ("top1", "top5"):
            found[f"{best}_drop"] = (truth[f"reference_{best}"] - truth[f"artifact_{best}"]) / truth["labeled"]
    return found


def tie_tolerance(output_limits: dict[str, float], output: Measured, settings: Settings) -> float:
    """How near a tie is: what rounding may move, and in int8 and fp8, which may move more, what it may in bf16."""
    if settings["precision"] in ROUNDOFF:
        return output_limits["relative_l2"]
    return tolerance("bf16", output["sensitivity"])


def _turned(output: Measured, window: float) -> list[Any]:
    return [change for change in output["top1_changes"] if change["margin"] > window]


def failures(outputs: dict[str, Measured], settings: Settings) -> Iterator[Failure]:
    """What is beyond its limit. UserError for a rule on an output that there is not, or on what it does not have."""
    check_rules(outputs, settings["gate"])
    for name, output in outputs.items():
        if "wrong" in output:
            yield Failure(name, "wrong", output["wrong"])
            continue
        allowed = limits(name, output, settings)
        near = tie_tolerance(allowed, output, settings)
        found = metric_values(output, near)
        for metric, limit in allowed.items():
            if metric not in found:
                continue  # of an output without classes
            beyond = found[metric] < limit if metric in AT_LEAST else found[metric] > limit
            if beyond or found[metric] != found[metric]:
                what = {**AT_MOST, **AT_LEAST}[metric]
                told = f"{what} {format_metric(metric, found[metric])}, limit {format_metric(metric, limit)}"
                yield Failure(name, metric, told + _worst(metric, output, near))


def check_rules(outputs: dict[str, Measured], found: list[dict[str, Any]]) -> None:
    """UserError for a rule on an output that there is not, or on what no output that it is for has."""
    for rule in found:
        if rule.get("output", next(iter(outputs))) not in outputs:
            raise UserError(f"accuracy.gate: there is no output {rule['output']!r}, only {', '.join(outputs)}")
        meant = [output for name, output in outputs.items() if rule.get("output", name) == name]
        for metric in rule.keys() - {"output"}:
            needs = "truth" if metric.endswith("drop") else "top1_changes" if metric in SHARES else "norm"
            if not any(needs in output or "wrong" in output for output in meant):
                lacks = {
                    "truth": "it needs accuracy.truth, the class that each sample shows, and an output with classes",
                    "top1_changes": "the output does not name classes: it has other dimensions than (batch, classes)",
                }
                raise UserError(f"accuracy.gate: {metric} of {rule.get('output', 'every output')}: {lacks[needs]}")


def _worst(metric: str, output: Measured, near: float) -> str:
    if metric in output["worst"]:
        return f", worst at {output['worst'][metric]}"
    if metric == "top1":
        change = max(_turned(output, near), key=lambda change: float(change["margin"]))
        classes = f"class {change['artifact_class']} for {change['reference_class']}"
        return f", worst at {change['sample']}: {classes}, which leads by {change['margin']:.2g} RMS"
    if metric == "top5":
        return f", lost at {output['top5_losses'][0]}"
    truth, best = output["truth"], metric.partition("_")[0]
    return f", {truth[f'artifact_{best}']} of {truth['labeled']} for {truth[f'reference_{best}']}"


def format_metric(metric: str, value: float) -> str:
    """A metric's value, as it is told."""
    if metric in SHARES:
        return f"{value:.1%}".replace(".0%", "%")
    if metric == "snr":
        return f"{value:.1f} dB"
    return f"{value:.6g}" if metric == "cosine" else f"{value:.1e}"


def untestable_reason(measured: Measured, settings: Settings) -> str | None:
    """Why agreement with this reference proves nothing, None where it does prove something."""
    if settings["random_weights"]:
        return "random weights"
    if (count := measured["distinct"]) < FEWEST:
        return f"{count} distinct sample{'s' if count > 1 else ''}, and at least {FEWEST} are needed"
    for name, output in measured["outputs"].items():
        if "wrong" in output:
            continue
        if output["spread"] < DEGENERATE:
            return f"output {name} is the same for all samples (spread {output['spread']:.0e})"
        allowed = tolerance(settings["precision"], output["sensitivity"])
        if settings["precision"] in ROUNDOFF and output["spread"] < allowed:
            return (
                f"output {name} differs between the samples by {output['spread']:.1e}, "
                f"less than it may be wrong by ({allowed:.1e})"
            )
    return None


def gate_error(measured: Measured, settings: Settings, advice: str) -> str | None:
    """Why an artifact is refused, with what to try; None where it passes.

    What makes the samples prove nothing refuses as well, unless the weights are random or the spec allows it; and of
    random weights, whose outputs rounding may change by any factor, reduced precision is only told.
    """
    doubted = untestable_reason(measured, settings)
    lenient = settings["random_weights"] and settings["precision"] != "fp32"
    found = list(failures(measured["outputs"], settings))
    judged = [failure for failure in found if failure.metric == "wrong" or not lenient]
    if judged:
        more = f" (and {len(judged) - 1} more: {_names(judged[1:])})" if judged[1:] else ""
        return f"output {judged[0].output}: {judged[0].told}{more}{advice}"
    if doubted and not (settings["random_weights"] or settings["allow_untestable"]):
        return f"accuracy cannot be tested: {doubted}; choose other samples, or set accuracy.allow_untestable"
    return None


def _names(found: list[Failure]) -> str:
    return ", ".join(f"{failure.metric} of {failure.output}" for failure in found)


def wilson_lower_bound(hits: int, count: int) -> float:
    """The share that `hits` of `count` proves with 95 % confidence: the lower bound of Wilson's interval, one-sided.

    Source: E. B. Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    z = 1.645
    share = hits / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count)


def nearest_limit(measured: dict[str, Any], settings: Settings) -> tuple[str, str]:
    """The relative L2 error that comes nearest to its limit, and this limit, both formatted for people."""
    outputs = measured["outputs"]
    bounds = {name: limits(name, outputs[name], settings)["relative_l2"] for name in outputs}
    name = max(bounds, key=lambda name: outputs[name]["relative_l2"] / bounds[name])
    return format_metric("relative_l2", outputs[name]["relative_l2"]), format_metric("relative_l2", bounds[name])
