"""Mistakes in [[engine.profiles]]. Only specs that have several optimization profiles import this module."""

from collections.abc import Iterator

from build_tasks.errors import listed, with_suggestion
from build_tasks.spec.engine_profiles import profile_range, profiles_of, promised_box
from build_tasks.spec.engine_tables import Profile
from build_tasks.spec.interface import dimensions_of
from build_tasks.spec.model import Model, Spec
from build_tasks.spec.value_checks import Mistake
from build_tasks.tensors import Range
from build_tasks.triton.optimization_profiles import find_uncovered, format_box

BATCH_KEYS = ("min_batch_size", "opt_batch_size", "max_batch_size")


def mistakes(model: Model) -> Iterator[Mistake]:
    """Yield what is wrong with [[engine.profiles]], each as (key, expected, found)."""
    spec, engine, dimensions = model.spec, model.spec.engine, dimensions_of(model.spec)
    for key in BATCH_KEYS:
        if (value := getattr(engine, key)) is not None:
            yield f"engine.{key}", "nothing, since [[engine.profiles]] has the batches", repr(value)
    if not spec.has_engine:
        yield "engine.profiles", "nothing, since formats has no engine", f"{len(engine.profiles)} of them"
    if not spec.onnx.dynamic_axes and not dimensions:
        yield "engine.profiles", "nothing, since no dimension is open", f"{len(engine.profiles)} of them"
        return
    wrong = False
    for index, table in enumerate(engine.profiles):
        for mistake in _profile_mistakes(spec, f"engine.profiles[{index}]", table, dimensions):
            wrong = True
            yield mistake
    profiles = profiles_of(spec)
    if wrong:
        return
    for index, profile in enumerate(profiles):
        if profile in profiles[:index]:
            other = profiles.index(profile)
            yield f"engine.profiles[{index}]", f"other ranges than those of profiles[{other}]", "the same"
            return
    if left := find_uncovered(promised_box(model), profiles):
        yield (
            "engine.profiles",
            "profiles that together take all that clients may send (max_batch_size, [dimensions])",
            f"none for {format_box(left)}",
        )


def _profile_mistakes(spec: Spec, key: str, table: Profile, dimensions: dict[str, Range]) -> Iterator[Mistake]:
    smallest, best, largest = spec.batches_of(table)
    if not spec.onnx.dynamic_axes:
        for name in BATCH_KEYS:
            if getattr(table, name) not in (None, spec.onnx.batch_size):
                expected = f"{spec.onnx.batch_size}, the batch that onnx.dynamic_axes = false fixes"
                yield f"{key}.{name}", expected, repr(getattr(table, name))
    elif not smallest <= best <= largest:
        yield key, "min_batch_size <= opt_batch_size <= max_batch_size", f"{smallest}, {best}, {largest}"
    for word, lengths in table.dimensions.items():
        if word not in dimensions:
            names = f"an open dimension, {listed(dimensions)}" if dimensions else "nothing, since no length is open"
            yield f"{key}.dimensions.{word}", names, with_suggestion(word, dimensions)
            continue
        least, tuned, most = (profile_range(lengths, dimensions[word])[point] for point in ("min", "opt", "max"))
        if not least <= tuned <= most:
            yield f"{key}.dimensions.{word}", "min <= opt <= max", f"{least}, {tuned}, {most}"
        elif least < dimensions[word]["min"] or most > dimensions[word]["max"]:
            bounds = dimensions[word]
            expected = f"lengths from {bounds['min']} to {bounds['max']}, those of the dimension"
            yield f"{key}.dimensions.{word}", expected, f"{least} to {most}"
