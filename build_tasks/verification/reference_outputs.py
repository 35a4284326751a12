"""The outputs of the reference on the accuracy samples, and runs of artifacts on the same samples."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.runtime.stage import Paths
from build_tasks.tensors import Feed, Signature, batch_of, resize, take
from build_tasks.verification import batch_check, metrics

if TYPE_CHECKING:
    import numpy as np
    from polygraphy.comparator import IterationResult

BATCH = 8  # samples that an artifact gets at once, if it takes as many
RunBatch = Callable[[Feed], "list[np.ndarray]"]  # from a batch of the inputs to the outputs of an artifact
MapBatches = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]  # like `map`


class Reference:
    """The samples and the outputs of the reference, read from the files that the reference stage writes.

    Attributes:
        samples: An array (samples, …) for each input, by its name.
        names: The names of the samples.
        outputs: The outputs of the reference by name.
        perturbed: Its outputs to inputs that are perturbed by one ulp.
        answers: The outputs of the artifact that was measured last.
    """

    def __init__(self, inputs: Paths):
        from polygraphy.comparator import RunResults
        from polygraphy.json import load_json

        self.samples: Feed = dict(load_json(inputs["samples"])[0])
        with open(inputs["names"], encoding="utf-8") as file:
            self.names = file.read().split("\n")[:-1]  # splitlines() also splits at other characters of Unicode
        results = RunResults.load(inputs["reference"])
        self.outputs: IterationResult
        self.perturbed: IterationResult
        self.answers: list[np.ndarray] = []
        self.outputs, self.perturbed = (results[index][1][0] for index in range(2))

    def measure(
        self,
        run: RunBatch,
        smallest: int,
        largest: int,
        top_k: int | None,
        truth: metrics.Truth | None = None,
        map_batches: MapBatches = map,
        batches: "Sequence[np.ndarray]" = (),
        class_names: list[str] | None = None,
    ) -> metrics.Measurements:
        """Run an artifact on all samples and return its figures.

        Args:
            run: Runs one batch.
            smallest: The smallest batch that the artifact takes.
            largest: The largest one.
            top_k: output.top_k of the spec. With it the first two outputs are values and their classes.
            truth: The classes that samples show.
            map_batches: Runs the batches.
            batches: Further batches, as indices of samples, whose answers are compared with those of the first.
            class_names: As of `metrics.compare_outputs`.
        """
        outputs = run_in_batches(run, self.samples, smallest, largest, map_batches)
        found = self.by_name(outputs)
        names = [*self.outputs]
        top_k_names = (names[0], names[1]) if top_k else None
        figures = metrics.compare_outputs(
            found, self.outputs, self.perturbed, self.names, truth, top_k_names, class_names
        )
        if batches:
            results = list(map_batches(functools.partial(self.compare_batch, run, outputs), list(batches)))
            for name, differences in zip(found, zip(*results, strict=True), strict=False):
                if name in figures and "wrong" not in figures[name]:  # the classes of top_k have no figures
                    figures[name]["worst_batch"] = max(differences, key=lambda each: each["difference"])
        self.answers = outputs
        return {
            "samples": batch_of(self.samples),
            "distinct": count_distinct(self.samples),
            "outputs": figures,
        }

    def by_name(self, outputs: "list[np.ndarray]") -> "IterationResult":
        """Return the outputs of an artifact by name. They are in the order of those of the reference."""
        from polygraphy.comparator import IterationResult

        names = [*self.outputs, *(f"output {index}" for index in range(len(self.outputs), len(outputs)))]
        return IterationResult(dict(zip(names, outputs, strict=False)))

    def compare_batch(
        self, run: RunBatch, answers: "list[np.ndarray]", batch: "np.ndarray"
    ) -> list[batch_check.BatchDifference]:
        """Run one batch, given as indices of samples, and compare it with the answers to all samples."""
        expected = list(self.outputs.values())
        return batch_check.compare_batch(run, self.samples, answers, expected, self.names, batch)


def run_in_batches(
    run: RunBatch, samples: Feed, smallest: int, largest: int, map_batches: MapBatches = map
) -> "list[np.ndarray]":
    """Return the outputs of an artifact for all samples, each output as one array (samples, …).

    The samples are cut to batches that the artifact takes. A last batch that is too small is filled with repeats.
    """
    import numpy as np

    size, count = min(max(BATCH, smallest), largest), batch_of(samples)

    def run_filled(batch: Feed) -> "list[np.ndarray]":
        own = batch_of(batch)
        return [output[:own] for output in run(resize(batch, max(own, smallest)))]

    parts = map_batches(run_filled, [take(samples, slice(start, start + size)) for start in range(0, count, size)])
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]


def count_distinct(samples: Feed) -> int:
    """The number of distinct samples: samples with equal bits count once."""
    arrays = samples.values()
    return len(
        {
            tuple(repr(array[i]) if array.dtype == object else array[i].tobytes() for array in arrays)
            for i in range(batch_of(samples))
        }
    )


def batch_sizes(signature: Signature) -> tuple[int, int]:
    """Return the smallest and the largest batch that is run of an artifact with this signature."""
    tensor = signature["inputs"][0]
    if profile := signature.get("profile"):
        shapes = profile[tensor["name"]]
        return shapes["min"][0], shapes["max"][0]
    return (1, BATCH) if tensor["shape"][0] == -1 else (tensor["shape"][0], tensor["shape"][0])
