"""The optimization profiles of a spec's engines, with their defaults.

[engine], [[engine.profiles]], [dimensions] ─► OptimizationProfile ─► engine, measure, config
"""

from typing import Literal

from build_tasks.spec.engine_tables import ProfileDimension
from build_tasks.spec.interface import dimensions_of
from build_tasks.spec.model import Model, Spec
from build_tasks.tensors import BATCH, OptimizationProfile, Range
from build_tasks.triton.optimization_profiles import Box


def profiles_of(spec: Spec) -> list[OptimizationProfile]:
    """Return the optimization profiles of a spec's engines. Without [[engine.profiles]] there is one."""
    dimensions = dimensions_of(spec)
    if not spec.engine.profiles:
        return [_profile(spec.profile, dimensions)]
    return [
        _profile(
            spec.batches_of(each),
            {word: profile_range(each.dimensions.get(word), bounds) for word, bounds in dimensions.items()},
        )
        for each in spec.engine.profiles
    ]


def _profile(batches: tuple[int, int, int], dimensions: dict[str, Range]) -> OptimizationProfile:
    smallest, best, largest = batches
    return {"batch": {"min": smallest, "opt": best, "max": largest}, "dimensions": dimensions}


def profile_range(table: ProfileDimension | None, bounds: Range) -> Range:
    """Return the lengths of a dimension in a profile. The tuned one is the nearest to that of the dimension."""
    table = table or ProfileDimension()
    least, most = table.min or bounds["min"], table.max or bounds["max"]
    return {"min": least, "opt": table.opt or max(least, min(bounds["opt"], most)), "max": most}


def lengths_of_profiles(spec: Spec) -> list[dict[str, int]]:
    """Return the smallest, the tuned and the largest lengths of each profile; empty without [[engine.profiles]]."""
    profiles = profiles_of(spec) if spec.engine.profiles and spec.has_engine else []
    ranges = [profile["dimensions"] for profile in profiles if profile["dimensions"]]
    points: tuple[Literal["min"], Literal["opt"], Literal["max"]] = ("min", "opt", "max")
    return [{word: bounds[point] for word, bounds in each.items()} for each in ranges for point in points]


def promised_box(model: Model) -> Box:
    """Return the batches and lengths that clients may send to the plan, or to TensorRT-RTX's engine."""
    spec = model.spec
    smallest, _, largest = spec.profile
    served = model.largest_batch("tensorrt") if "tensorrt" in spec.formats else spec.max_batch_size
    most = min(served or largest, largest)
    lengths = {word: (bounds["min"], bounds["max"]) for word, bounds in dimensions_of(spec).items()}
    return {BATCH: (min(smallest, most), most), **lengths}
