"""The outputs of the reference on the accuracy samples, and runs of artifacts beside them."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from build_tasks.runtime.stage import Paths
from build_tasks.tensors import INPUT, OUTPUT
from build_tasks.verification import metrics

if TYPE_CHECKING:
    import numpy as np
    from polygraphy.comparator import IterationResult

BATCH = 8
RunBatch = Callable[["np.ndarray"], "list[np.ndarray]"]
Each = Callable[[RunBatch, "list[np.ndarray]"], Iterable["list[np.ndarray]"]]  # the answers to batches, in order


class Reference:
    """The samples, and what PyTorch answers to them, as the reference stage keeps them."""

    def __init__(self, inputs: Paths):
        from polygraphy.comparator import RunResults
        from polygraphy.json import load_json

        self.samples: np.ndarray = load_json(inputs["samples"])[0][INPUT]
        with open(inputs["names"], encoding="utf-8") as file:
            self.names = file.read().split("\n")[:-1]  # and not at every character that Unicode calls a line's end
        results = RunResults.load(inputs["reference"])
        self.answers: IterationResult
        self.moved: IterationResult
        self.answers, self.moved = (results[index][1][0] for index in range(2))

    def measure(
        self,
        run: RunBatch,
        smallest: int,
        largest: int,
        top_k: int | None,
        truth: metrics.Truth | None = None,
        each: Each = map,
    ) -> dict[str, Any]:
        """The figures of an artifact that is run, from a batch to its outputs, by batches of at least and at most."""
        from polygraphy.comparator import IterationResult

        answers = run_in_batches(run, self.samples, smallest, largest, each)
        found = IterationResult({OUTPUT.format(index): answer for index, answer in enumerate(answers)})
        best = (OUTPUT.format(0), OUTPUT.format(1)) if top_k else None
        return {
            "samples": len(self.samples),
            "distinct": metrics.count_distinct(self.samples),
            "outputs": metrics.compare_outputs(found, self.answers, self.moved, self.names, truth, best),
        }


def run_in_batches(
    run: RunBatch, samples: "np.ndarray", smallest: int, largest: int, each: Each = map
) -> "list[np.ndarray]":
    """The outputs for all samples, in batches that the artifact takes; too small a last one is filled with repeats."""
    import numpy as np

    size = min(max(BATCH, smallest), largest)

    def asked(batch: "np.ndarray") -> "list[np.ndarray]":
        filled = np.resize(batch, (max(len(batch), smallest), *batch.shape[1:]))
        return [answer[: len(batch)] for answer in run(np.ascontiguousarray(filled))]

    parts = each(asked, [samples[start : start + size] for start in range(0, len(samples), size)])
    return [np.concatenate(answers) for answers in zip(*parts, strict=True)]


def batch_sizes(signature: dict[str, Any]) -> tuple[int, int]:
    """The smallest and the largest batch of the samples that the artifact takes at once."""
    tensor = signature["inputs"][0]
    if profile := signature.get("profile"):
        return profile[tensor["name"]]["min"][0], profile[tensor["name"]]["max"][0]
    return (1, BATCH) if tensor["shape"][0] == -1 else (tensor["shape"][0], tensor["shape"][0])
