"""The outputs of the reference on the accuracy samples, and runs of artifacts on the same samples."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from build_tasks.runtime.stage import Paths
from build_tasks.tensors import Feed, Signature, batch_of, profile_batches, resize, take
from build_tasks.verification import batch_check, metrics
from build_tasks.verification.sample_groups import count_distinct, count_samples, group_of, join_outputs

if TYPE_CHECKING:
    import numpy as np
    from polygraphy.comparator import IterationResult

BATCH = 8  # samples that an artifact gets at once, if it takes as many
Outputs = list["np.ndarray"]  # of one group of samples
RunBatch = Callable[[Feed], "list[np.ndarray]"]  # from a batch of the inputs to the outputs of an artifact
MapBatches = Callable[[Callable[[Any], Any], list[Any]], Iterable[Any]]  # like `map`


class Batch(Struct, frozen=True):
    """A batch of samples, and what runs it: an artifact, maybe with one of its optimization profiles."""

    run: RunBatch
    samples: "np.ndarray"  # their numbers


class Reference:
    """The samples and the outputs of the reference, read from the files that the reference stage writes.

    Attributes:
        groups: The samples in groups of one shape, each with an array (samples, …) for each input, by its name.
        names: The names of the samples, of one group after the other.
        parts: The outputs of the reference for each group.
        outputs: The outputs of the reference by name, for all groups.
        perturbed: Its outputs to inputs that are perturbed by one ulp.
        answers: The outputs, for each group, of the artifact that was measured last.
    """

    def __init__(self, inputs: Paths):
        from polygraphy.comparator import RunResults
        from polygraphy.json import load_json

        self.groups: list[Feed] = [dict(feed) for feed in load_json(inputs["samples"])]
        with open(inputs["names"], encoding="utf-8") as file:
            self.names = file.read().split("\n")[:-1]  # splitlines() also splits at other characters of Unicode
        results = RunResults.load(inputs["reference"])
        self.answers: list[Outputs] = []
        self.parts = [list(iteration.values()) for iteration in results[0][1]]
        self.outputs: IterationResult = results[0][1][0]  # its names, for by_name
        self.outputs = self.by_name(self.parts)
        self.perturbed = self.by_name([list(iteration.values()) for iteration in results[1][1]])

    def measure(
        self,
        run: RunBatch,
        smallest: int,
        largest: int,
        top_k: int | None,
        truth: metrics.Truth | None = None,
        map_batches: MapBatches = map,
        batches: "Sequence[Batch]" = (),
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
            batches: Further batches, whose answers are compared with those of the first.
            class_names: As of `metrics.compare_outputs`.
        """
        answers = run_in_batches(run, self.groups, smallest, largest, map_batches)
        found = self.by_name(answers)
        names = [*self.outputs]
        top_k_names = (names[0], names[1]) if top_k else None
        figures = metrics.compare_outputs(
            found, self.outputs, self.perturbed, self.names, truth, top_k_names, class_names
        )
        if batches:
            results = list(map_batches(functools.partial(self.compare_batch, answers), list(batches)))
            for name, differences in zip(found, zip(*results, strict=True), strict=False):
                if name in figures and "wrong" not in figures[name]:  # the classes of top_k have no figures
                    figures[name]["worst_batch"] = max(differences, key=lambda each: each["difference"])
        self.answers = answers
        return {
            "samples": count_samples(self.groups),
            "distinct": count_distinct(self.groups),
            "outputs": figures,
        }

    def by_name(self, parts: Sequence[Outputs]) -> "IterationResult":
        """Return outputs by name, from those of each group, which are in the order of those of the reference."""
        from polygraphy.comparator import IterationResult

        outputs = join_outputs(parts)
        names = [*self.outputs, *(f"output {index}" for index in range(len(self.outputs), len(outputs)))]
        return IterationResult(dict(zip(names, outputs, strict=False)))

    def compare_batch(self, answers: Sequence[Outputs], batch: Batch) -> list[batch_check.BatchDifference]:
        """Run one batch and compare it with the answers to the samples of its group."""
        group, start, indices = group_of(self.groups, batch.samples)
        feed = self.groups[group]
        names = self.names[start : start + batch_of(feed)]
        return batch_check.compare_batch(batch.run, feed, answers[group], self.parts[group], names, indices)


def run_in_batches(
    run: RunBatch, groups: Sequence[Feed], smallest: int, largest: int, map_batches: MapBatches = map
) -> list[Outputs]:
    """Return the outputs of an artifact for each group of samples, each output as one array (samples, …).

    The samples are cut to batches that the artifact takes. A last batch that is too small is filled with repeats.
    """
    import numpy as np

    size = min(max(BATCH, smallest), largest)

    def run_filled(batch: Feed) -> "list[np.ndarray]":
        own = batch_of(batch)
        return [output[:own] for output in run(resize(batch, max(own, smallest)))]

    batches = [[take(feed, slice(start, start + size)) for start in range(0, batch_of(feed), size)] for feed in groups]
    results = iter(map_batches(run_filled, [batch for group in batches for batch in group]))
    return [
        [np.concatenate(outputs) for outputs in zip(*(next(results) for _ in group), strict=True)] for group in batches
    ]


def batch_sizes(signature: Signature) -> tuple[int, int]:
    """Return the smallest and the largest batch that is run of an artifact with this signature."""
    batch = signature["inputs"][0]["shape"][0]
    if profiles := profile_batches(signature):
        return min(profile[0] for profile in profiles), max(profile[2] for profile in profiles)
    return (1, BATCH) if batch == -1 else (batch, batch)
