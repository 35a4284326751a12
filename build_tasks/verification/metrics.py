"""The differences between the outputs of an artifact and the reference, computed by Polygraphy for every sample.

    outputs of the artifact ──┐
    outputs of the reference ─┴► compare_outputs ─► OutputFigures by output ─► model.*.measured.json

The figures depend on no limit, so nothing is measured again after a limit has changed. gate.py applies the limits.
"""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypedDict

from build_tasks.errors import UserError
from build_tasks.verification.batch_check import BatchDifference

if TYPE_CHECKING:
    import numpy as np
    from polygraphy.comparator import IterationResult

Truth = dict[int, int]  # the index of a sample -> the class that it shows

TOP = 5  # classes that top-5 metrics look at
LARGEST_SNR = 999.0  # dB; JSON has no infinity


class ClassChange(TypedDict):
    """A sample whose strongest class differs between the reference and the artifact."""

    sample: str  # its name
    reference_class: int
    artifact_class: int
    margin: float  # reference values: first class minus the other, over the root mean square of the sample's values


class TruthCounts(TypedDict):
    """The numbers of labeled samples that are recognized, by the fp32 network and by the artifact."""

    labeled: int
    reference_top1: int
    reference_top5: int
    artifact_top1: int
    artifact_top5: int


class OutputFigures(TypedDict, total=False):
    """The figures of one output: either `wrong` alone, or the keys after it.

    The keys from `samples` on exist for outputs with classes, `truth` if the classes of samples are known.
    """

    wrong: str  # the reason why nothing could be measured
    relative_l2: float  # relative L2 error over all samples together
    cosine: float  # cosine, snr and max_absolute are those of the worst sample
    snr: float  # dB
    max_absolute: float
    worst: dict[str, str]  # the name of the worst sample, by metric
    norm: float  # L2 norm of the reference
    largest: float  # largest absolute value of the reference
    spread: float  # how far the samples differ from their mean, over the norm
    errors: list[float]  # relative L2 error of each sample
    sensitivity: float  # relative L2 change of the reference after its inputs are perturbed by one ulp
    samples: int
    classes: list[int]  # the reference's class for each sample
    top1_changes: list[ClassChange]
    top5_losses: list[str]  # names of samples whose class is not among the artifact's strongest five
    truth: TruthCounts
    worst_batch: BatchDifference  # for artifacts that were run in other batches, too
    arithmetic: str  # "tf32" if the artifact's fp32 was computed with this rounding, on a GPU


class Measurements(TypedDict):
    """The figures of an artifact on all samples."""

    samples: int
    distinct: int  # without samples that are the same to the bit
    outputs: dict[str, OutputFigures]


class MeasuredFile(Measurements):
    """What model.*.measured.json holds: the figures, and the digests of the files that they were measured with."""

    model: str | None
    signature: str | None
    reference: str | None
    device: str  # "CPU", or the name of the GPU


def compare_outputs(
    artifact: "IterationResult",
    reference: "IterationResult",
    perturbed: "IterationResult",
    names: list[str],
    truth: Truth | None = None,
    top_k_names: tuple[str, str] | None = None,
    class_names: Collection[str] | None = None,
) -> dict[str, OutputFigures]:
    """Return the figures of each output of the reference.

    An output that is missing, has another shape, or contains a NaN or an infinity gets the key `wrong` alone.

    Args:
        artifact: The outputs of the artifact by name, arrays of shape (samples, …).
        reference: The outputs of the reference.
        perturbed: The outputs of the reference to inputs that are perturbed by one ulp.
        names: The names of the samples.
        truth: The classes that samples show. They are counted for the first output that holds classes.
        top_k_names: The outputs with the largest values and with their classes. The figures of the classes are those
            of the values.
        class_names: The outputs (batch, n) that hold a score for each class. None: the first one of that shape.
    Raises:
        UserError: If truth names a class that the network does not have, or if no output has classes.
    """
    import numpy as np

    outputs: dict[str, OutputFigures] = {}
    values_name, classes_name = top_k_names or (None, None)
    if class_names is None:
        class_names = [name for name, values in reference.items() if values.ndim == 2 and values.shape[1] > 1][:1]
    for name, expected in reference.items():
        if name not in artifact:
            outputs[name] = {"wrong": f"the output is missing; the artifact has {', '.join(artifact)}"}
            continue
        answer = artifact[name]
        if answer.shape != expected.shape:
            outputs[name] = {"wrong": f"shape {list(expected.shape)} expected, {list(answer.shape)} found"}
        elif reason := _not_finite(answer, names):
            outputs[name] = {"wrong": reason}
        elif reason := _not_finite(expected, names):
            outputs[name] = {"wrong": f"the reference itself: {reason}"}
        elif name != classes_name:
            # A norm in fp16 overflows at 65504, and bool has no difference.
            answer, expected, shifted = (array.astype(np.float64) for array in (answer, expected, perturbed[name]))
            figures = _error_figures(answer, expected, names)
            sensitivity = float(np.linalg.norm(np.nan_to_num(shifted) - expected)) / figures["norm"]
            figures["sensitivity"] = min(sensitivity, 1.0)  # a larger value means the same, and may be infinite
            outputs[name] = figures
            if name == values_name and classes_name in artifact:
                ranks, expected_ranks, width = artifact[classes_name], reference[classes_name], None
            elif expected.ndim == 2 and expected.shape[1] > 1 and name in class_names:
                ranks, expected_ranks, width = strongest_classes(answer), strongest_classes(expected), expected.shape[1]
            else:
                continue
            margin = _margin_of(expected, expected_ranks if name == values_name else None)
            figures |= _class_figures(ranks, expected_ranks, margin, names)
            if truth and not any("truth" in output for output in outputs.values()):
                figures["truth"] = _count_truth(ranks, expected_ranks, width, truth, names)
    for name in artifact:
        if name not in reference:
            outputs[name] = {"wrong": "the reference has no such output"}
    if truth and not any("truth" in output or "wrong" in output for output in outputs.values()):
        raise UserError(f"accuracy.truth: no output of {', '.join(reference)} holds a score for each class")
    return outputs


def _not_finite(values: "np.ndarray", names: list[str]) -> str | None:
    """The place where an output is NaN or infinite, for a message. None if all values are finite."""
    import numpy as np

    finite = np.isfinite(values)
    if finite.all():
        return None
    samples = np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))
    where = f"in {len(samples)} of {len(values)} samples, {names[samples[0]]} the first"
    return f"NaN or infinity in {finite.size - finite.sum()} of {finite.size} values, {where}"


def _error_figures(artifact: "np.ndarray", expected: "np.ndarray", names: list[str]) -> OutputFigures:
    """The figures that do not depend on classes, without the sensitivity. Both arrays are float64 (samples, …)."""
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
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):  # otherwise it logs its own result for every sample
        for signal, answer in zip(expected, artifact, strict=True):
            pair = [IterationResult({"": np.atleast_1d(value)}) for value in (signal, answer)]
            for figure, function in functions.items():
                figures[figure].append(float(getattr(function(*pair)[""], figure)))
        both = [IterationResult({"": values}) for values in (expected, artifact)]
        whole = SimpleCompareFunc(check_error_stat="max")(*both)
    by_sample = {figure: np.array(values) for figure, values in figures.items()}
    norm = float(np.linalg.norm(expected)) or 1.0
    spread = float(np.linalg.norm(expected - expected.mean(axis=0)))
    worst = {
        "relative_l2": by_sample["l2_norm"].argmax(),
        "cosine": by_sample["cosine_similarity"].argmin(),
        "snr": by_sample["snr"].argmin(),
        "max_absolute": np.abs(artifact - expected).reshape(len(expected), -1).max(axis=1, initial=0).argmax(),
    }
    return {
        # Errors have three digits: a batch of another size changes the ones after them.
        "relative_l2": float(f"{np.linalg.norm(by_sample['l2_norm']) / norm:.3g}"),
        "cosine": float(by_sample["cosine_similarity"].min()),
        "snr": max(-LARGEST_SNR, min(float(by_sample["snr"].min()), LARGEST_SNR)),
        "max_absolute": float(whole[""].max_absdiff),
        "worst": {metric: names[sample] for metric, sample in worst.items()},
        "norm": norm,
        "largest": float(np.abs(expected).max(initial=0.0)),
        "spread": spread / norm,
        # Over the root mean square of the norms of all samples, so that a sample with small outputs is no outlier.
        "errors": [float(f"{error * len(expected) ** 0.5 / norm:.3g}") for error in by_sample["l2_norm"]],
    }


def _class_figures(
    artifact: "np.ndarray", expected: "np.ndarray", margin: Callable[[int, int, int], float], names: list[str]
) -> OutputFigures:
    """The reference's class of each sample, and the samples to which the artifact gives another class.

    Args:
        artifact: The classes of each sample by the artifact, strongest first: (samples, classes).
        expected: The same by the reference.
        margin: The margin of a class over another, from (sample, class, other class).
    """
    import numpy as np

    changes: list[ClassChange] = []
    for sample in map(int, np.flatnonzero(artifact[:, 0] != expected[:, 0])):
        first, other = int(expected[sample, 0]), int(artifact[sample, 0])
        changes.append(
            {
                "sample": names[sample],
                "reference_class": first,
                "artifact_class": other,
                "margin": margin(sample, first, other),
            }
        )
    losses = np.flatnonzero((artifact[:, :TOP] != expected[:, :1]).all(axis=1))
    return {
        "samples": len(artifact),
        "classes": expected[:, 0].tolist(),
        "top1_changes": changes,
        "top5_losses": [names[sample] for sample in losses],
    }


def _margin_of(values: "np.ndarray", classes: "np.ndarray | None") -> Callable[[int, int, int], float]:
    """Return the function from (sample, class, other class) to a margin, in root mean squares of the sample's values.

    Args:
        values: (samples, classes), of all classes or of the classes in `classes`.
        classes: The classes that the values belong to, strongest first. None if each column is a class. The value of
            a class that is not among them is at most the last one, which stands for it.
    """

    def margin(sample: int, first: int, other: int) -> float:
        row = values[sample]
        if classes is None:
            difference = row[first] - row[other]
        else:
            columns = list(classes[sample])
            difference = row[0] - row[columns.index(other) if other in columns else -1]
        return float(difference / (float((row**2).mean()) ** 0.5 or 1.0))

    return margin


def _count_truth(
    artifact: "np.ndarray", expected: "np.ndarray", width: int | None, truth: Truth, names: list[str]
) -> TruthCounts:
    """Count the samples that are recognized.

    Args:
        artifact: The classes of each sample by the artifact, strongest first: (samples, classes).
        expected: The same by the reference.
        width: The number of classes of the network. None if it is not known.
    Raises:
        UserError: If the network does not have one of the classes.
    """
    import numpy as np

    samples = sorted(truth)
    for sample in samples:
        if width is not None and truth[sample] >= width:
            raise UserError(
                f"accuracy.truth: {names[sample]} shows class {truth[sample]}, but the network has {width} classes, "
                f"0 to {width - 1}"
            )
    classes = np.array([truth[sample] for sample in samples])[:, None]
    reference_hits, artifact_hits = (ranks[samples, :TOP] == classes for ranks in (expected, artifact))
    return {
        "labeled": len(samples),
        "reference_top1": int(reference_hits[:, 0].sum()),
        "reference_top5": int(reference_hits.any(axis=1).sum()),
        "artifact_top1": int(artifact_hits[:, 0].sum()),
        "artifact_top5": int(artifact_hits.any(axis=1).sum()),
    }


def strongest_classes(outputs: "np.ndarray") -> "np.ndarray":
    """The strongest five classes of each sample, or all if there are fewer. Equal values are sorted by index."""
    import numpy as np
    from polygraphy.comparator import IterationResult, TopKPostprocessFunc

    top = TopKPostprocessFunc(k=TOP)
    indices: np.ndarray = top(IterationResult({"": outputs}))[""]
    return indices


def key_figures(measured: Measurements) -> dict[str, Any]:
    """The figure for the line of a task: the largest error.

    How many samples keep their class is not among them: which changes are near ties, only the gate knows.
    """
    outputs = measured["outputs"].values()
    if wrong := [output["wrong"] for output in outputs if "wrong" in output]:
        return {"wrong": wrong[0]}
    return {"error": max(output["relative_l2"] for output in outputs)}
