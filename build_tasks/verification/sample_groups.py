"""Samples of different shapes: groups that can be batched, and arrays of the outputs for the samples of all groups.

    samples.json: [{input: (samples, …), …}, …]     a feed for each group, as Polygraphy's --save-inputs writes it
    reference.json                                  an iteration for each group

The samples are numbered through all groups, in their order.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from build_tasks.tensors import Feed, batch_of

if TYPE_CHECKING:
    import numpy as np


def count_samples(groups: Sequence[Feed]) -> int:
    """Return the number of samples in all groups."""
    return sum(map(batch_of, groups))


def group_of(groups: Sequence[Feed], batch: "np.ndarray") -> tuple[int, int, "np.ndarray"]:
    """Return a group, the number of its first sample, and a batch of indices in this group.

    It is the group of the batch's first sample. Samples of other groups, which cannot be in the same batch, are
    replaced by some of this one.

    Args:
        batch: Numbers of samples.
    """
    start, index = 0, 0
    while batch[0] >= start + batch_of(groups[index]):
        start += batch_of(groups[index])
        index += 1
    return index, start, (batch - start) % batch_of(groups[index])


def group_starts(groups: Sequence[Feed]) -> list[int]:
    """Return the number of the first sample of each group."""
    return [sum(map(batch_of, groups[:index])) for index in range(len(groups))]


def join_outputs(parts: "Sequence[Sequence[np.ndarray]]") -> "list[np.ndarray]":
    """Return each output as one array for the samples of all groups.

    Where the length of a dimension depends on the group, shorter ones are filled with zeros. Norms, differences and
    largest values stay the same, if both of two arrays are filled so.

    Args:
        parts: The outputs of each group.
    """
    import numpy as np

    if len(parts) == 1:
        return list(parts[0])
    joined = []
    for arrays in zip(*parts, strict=True):
        if len({array.ndim for array in arrays}) == 1:
            dims = [max(lengths) for lengths in zip(*(array.shape[1:] for array in arrays), strict=True)]
            arrays = tuple(
                np.pad(array, [(0, 0), *((0, most - own) for most, own in zip(dims, array.shape[1:], strict=True))])
                for array in arrays
            )
        joined.append(np.concatenate(arrays))
    return joined


def count_distinct(groups: Sequence[Feed]) -> int:
    """Return the number of distinct samples: samples with equal bits count once."""
    return len(
        {
            tuple(
                (array.shape, repr(array[index]) if array.dtype == object else array[index].tobytes())
                for array in feed.values()
            )
            for feed in groups
            for index in range(batch_of(feed))
        }
    )
