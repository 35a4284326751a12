"""The batches in which an engine with several optimization profiles is run, each profile at its own sizes.

    profiles of the engine ─┐
    groups of samples ──────┴► groups whose lengths a profile takes, at its smallest, tuned, largest and an odd batch

What Triton chooses for the samples is compared with the reference. A profile that is never the nearest one would not be
seen there, and has kernels of its own.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from build_tasks.tensors import Feed, ProfileShapes, batch_of
from build_tasks.verification.batch_check import arrangements, batches_between
from build_tasks.verification.reference_outputs import Batch
from build_tasks.verification.sample_groups import group_starts

Profiles = Sequence[Mapping[str, ProfileShapes]]


def batches_of_profiles(run: Callable[..., Any], profiles: Profiles, groups: Sequence[Feed]) -> list[Batch]:
    """Return the batches of each profile, with the samples of each group whose lengths it takes.

    Args:
        run: Runs a batch with a profile, `profile=0`.
        profiles: Those of the engine's signature.
        groups: The samples in groups of one shape.
    """
    batches = []
    for index, profile in enumerate(profiles):
        own = functools.partial(run, profile=index)
        shapes = next(iter(profile.values()))
        sizes = batches_between(shapes["min"][0], shapes["opt"][0], shapes["max"][0])
        for start, feed in zip(group_starts(groups), groups, strict=True):
            if takes_lengths(profile, feed):
                orders = arrangements(batch_of(feed), sizes, repeated=sizes)
                batches += [Batch(own, start + samples) for samples in orders]
    return batches


def untried_profiles(profiles: Profiles, groups: Sequence[Feed]) -> list[int]:
    """Return the indices of profiles whose lengths no sample has. A single profile takes all samples."""
    if len(profiles) < 2:
        return []
    return [index for index, profile in enumerate(profiles) if not any(takes_lengths(profile, f) for f in groups)]


def takes_lengths(profile: Mapping[str, ProfileShapes], feed: Feed) -> bool:
    """Return whether a profile takes the lengths of samples, whatever their number is."""
    return all(
        least <= length <= most
        for name, points in profile.items()
        for length, least, most in zip(feed[name].shape[1:], points["min"][1:], points["max"][1:], strict=True)
    )
