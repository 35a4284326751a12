"""How far an artifact's outputs are from the reference's: Polygraphy's comparisons of every sample, as plain data.

What is written here depends on no limit, so that another limit measures nothing anew. See gate.py for the judgement.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from polygraphy.comparator import IterationResult

Measured = dict[str, Any]
Truth = dict[int, int]  # a sample's place -> the class that it shows


def compare_outputs(
    found: "IterationResult",
    reference: "IterationResult",
    moved: "IterationResult",
    names: list[str],
    truth: Truth | None = None,
    best: tuple[str, str] | None = None,
) -> dict[str, Measured]:
    """What there is to say about each output of the reference, by its name.

    Each value holds arrays of shape (samples, …). moved: the reference's own answers to inputs that are an ulp off.
    best: the names of the outputs that hold the largest values and their classes; the classes are told with the values.
    An output that is missing, or has another shape, or a NaN or infinity in it, has a key "wrong" and no figures.
    """
    import numpy as np

    outputs: dict[str, Measured] = {}
    values, classes = best or (None, None)
    for name, expected in reference.items():
        if name not in found:
            outputs[name] = {"wrong": f"it is not there, only {', '.join(found)}"}
            continue
        answer = found[name]
        if answer.shape != expected.shape:
            outputs[name] = {"wrong": f"shape {list(expected.shape)} expected, {list(answer.shape)} found"}
        elif bad := _not_finite(answer, names) or _not_finite(expected, names):
            whose = "" if _not_finite(answer, names) else "the reference itself: "
            outputs[name] = {"wrong": f"{whose}{bad}"}
        elif name != classes:
            # A norm in fp16 overflows at 65504, and bool knows no difference.
            answer, expected, shifted = (values.astype(np.float64) for values in (answer, expected, moved[name]))
            outputs[name] = _measured(answer, expected, names)
            sensitivity = float(np.linalg.norm(np.nan_to_num(shifted) - expected)) / outputs[name]["norm"]
            outputs[name]["sensitivity"] = min(sensitivity, 1.0)  # more says no more, and may be infinite
            if name == values and classes in found:
                ours, theirs, width = found[classes], reference[classes], None
            elif expected.ndim == 2 and expected.shape[1] > 1:
                ours, theirs, width = ranked(answer), ranked(expected), expected.shape[1]
            else:
                continue
            lead = functools.partial(_lead, expected, theirs if name == values else None)
            outputs[name] |= _classes(ours, theirs, lead, names)
            if truth and not any("truth" in output for output in outputs.values()):  # of the first that has classes
                outputs[name] |= _truth(ours, theirs, width, truth, names)
    outputs |= {name: {"wrong": "the reference has no such output"} for name in found if name not in reference}
    return outputs


def _not_finite(values: "np.ndarray", names: list[str]) -> str | None:
    import numpy as np

    finite = np.isfinite(values)
    if finite.all():
        return None
    samples = np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))
    where = f"in {len(samples)} of {len(values)} samples, {names[samples[0]]} the first"
    return f"NaN or infinity in {finite.size - finite.sum()} of {finite.size} values, {where}"


def _measured(found: "np.ndarray", expected: "np.ndarray", names: list[str]) -> Measured:
    """The figures of one output. Its norms are of all samples together; the rest is of the sample where it is worst."""
    import numpy as np
    from polygraphy.comparator import (
        CosineSimilarityCompareFunc,
        IterationResult,
        L2CompareFunc,
        SimpleCompareFunc,
        SnrCompareFunc,
    )
    from polygraphy.logger import G_LOGGER

    functions = {
        "l2_norm": L2CompareFunc(),
        "cosine_similarity": CosineSimilarityCompareFunc(),
        "snr": SnrCompareFunc(),
    }
    figures: dict[str, list[float]] = {name: [] for name in functions}
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # it would tell of each sample what it thinks of it
        for signal, answer in zip(expected, found, strict=True):
            pair = [IterationResult({"": np.atleast_1d(value)}) for value in (signal, answer)]
            for figure, function in functions.items():
                figures[figure].append(float(getattr(function(*pair)[""], figure)))
        whole = SimpleCompareFunc(check_error_stat="max")(IterationResult({"": expected}), IterationResult({"": found}))
    by_sample = {figure: np.array(values) for figure, values in figures.items()}
    norm = float(np.linalg.norm(expected)) or 1.0
    spread = float(np.linalg.norm(expected - expected.mean(axis=0)))
    worst = {
        "relative_l2": by_sample["l2_norm"].argmax(),
        "cosine": by_sample["cosine_similarity"].argmin(),
        "snr": by_sample["snr"].argmin(),
        "max_absolute": np.abs(found - expected).reshape(len(expected), -1).max(axis=1, initial=0).argmax(),
    }
    return {
        "relative_l2": float(np.linalg.norm(by_sample["l2_norm"])) / norm,
        "cosine": float(by_sample["cosine_similarity"].min()),
        "snr": max(-999.0, min(float(by_sample["snr"].min()), 999.0)),  # JSON has no infinity
        "max_absolute": float(whole[""].max_absdiff),
        "worst": {metric: names[sample] for metric, sample in worst.items()},
        "norm": norm,
        "largest": float(np.abs(expected).max(initial=0.0)),
        "spread": spread / norm,
        # Over the root mean square of all samples' norms, so that a sample with a small answer is no outlier.
        "errors": [float(f"{error * len(expected) ** 0.5 / norm:.3g}") for error in by_sample["l2_norm"]],
    }


def _classes(
    found: "np.ndarray", expected: "np.ndarray", lead: Callable[[int, int, int], float], names: list[str]
) -> Measured:
    """Each sample's class by the reference; which samples are put into another, and how far its lead was; which leave
    its best five.

    found, expected: the classes of each sample, strongest first. lead: of a sample's class before another.
    """
    import numpy as np

    changes = []
    for sample in np.flatnonzero(found[:, 0] != expected[:, 0]):
        classes = int(expected[sample, 0]), int(found[sample, 0])
        changes.append(
            {
                "sample": names[sample],
                "reference_class": classes[0],
                "artifact_class": classes[1],
                "margin": lead(int(sample), *classes),
            }
        )
    losses = np.flatnonzero((found[:, :5] != expected[:, :1]).all(axis=1))
    return {
        "samples": len(found),
        "classes": expected[:, 0].tolist(),
        "top1_changes": changes,
        "top5_losses": [names[sample] for sample in losses],
    }


def _lead(values: "np.ndarray", classes: "np.ndarray | None", sample: int, first: int, other: int) -> float:
    """How far a class is before another, over the root mean square of the sample's values.

    values: of all classes, or of those in `classes`; of one that is not among them, at most the last value is known.
    """
    own = values[sample]
    if classes is None:
        difference = own[first] - own[other]
    else:
        places = list(classes[sample])
        difference = own[0] - own[places.index(other) if other in places else -1]
    return float(difference / (float((own**2).mean()) ** 0.5 or 1.0))


def _truth(found: "np.ndarray", expected: "np.ndarray", width: int | None, truth: Truth, names: list[str]) -> Measured:
    """How many samples are recognised, by the fp32 network and by the artifact. UserError for a class there is not.

    found, expected: the classes of each sample, strongest first. width: how many classes there are, as far as known.
    """
    import numpy as np

    samples = sorted(truth)
    for sample in samples:
        if width is not None and truth[sample] >= width:
            raise UserError(
                f"accuracy.truth: {names[sample]} shows class {truth[sample]}, and the network knows "
                f"{width}, which begin with 0"
            )
    classes = np.array([truth[sample] for sample in samples])[:, None]
    counts = {"labeled": len(samples)}
    for who, ranks in (("reference", expected), ("artifact", found)):
        hits = ranks[samples, :5] == classes
        counts |= {f"{who}_top1": int(hits[:, 0].sum()), f"{who}_top5": int(hits.any(axis=1).sum())}
    return {"truth": counts}


def ranked(outputs: "np.ndarray") -> "np.ndarray":
    """The five strongest classes of each sample, or all there are, strongest first; of equals the first."""
    import numpy as np
    from polygraphy.comparator import IterationResult, TopKPostprocessFunc

    top = TopKPostprocessFunc(k=5)
    indices: np.ndarray = top(IterationResult({"": outputs}))[""]
    return indices


def count_distinct(samples: "np.ndarray") -> int:
    """How many samples there are, not counting those that are the same to the bit."""
    return len({sample.tobytes() for sample in samples})


def key_figures(measured: dict[str, Any]) -> dict[str, Any]:
    """The figures for the one line of a task: the largest error, and the number of samples that keep their class."""
    outputs = measured["outputs"].values()
    if wrong := [output["wrong"] for output in outputs if "wrong" in output]:
        return {"wrong": wrong[0]}
    figures: dict[str, Any] = {"error": max(output["relative_l2"] for output in outputs)}
    for output in outputs:
        if "top1_changes" in output:
            figures.setdefault("top-1", f"{output['samples'] - len(output['top1_changes'])} of {output['samples']}")
    return figures
