"""Inputs that a network can be run with when there are no samples, at all lengths that must work."""

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from build_tasks.tensors import InputTensor, Interface, Range, dims_at, tuned_lengths

if TYPE_CHECKING:
    pass

Lengths = dict[str, int]  # of each open dimension, by its word


def lengths_to_check(dimensions: Mapping[str, Range]) -> list[Lengths]:
    """Return the lengths that are proven: those to tune for, the smallest, the largest, and mixtures.

    With one word, the third is a length between; with several, some are at their smallest and the others at their
    largest length, in both ways. In one of them all words have different lengths, and none is 1: what is added to each
    other fits in all lengths that are equal or 1, although the words may differ.
    """
    tuned = tuned_lengths(dimensions)
    smallest = {word: bounds["min"] for word, bounds in dimensions.items()}
    largest = {word: bounds["max"] for word, bounds in dimensions.items()}
    cases = [tuned, smallest, largest]
    if len(dimensions) == 1:
        ((word, bounds),) = dimensions.items()
        between = (bounds["min"] + bounds["max"]) // 2 | 1  # odd, which even strides show
        cases += [{word: between}] if bounds["min"] < between < bounds["max"] else []
    for ends in ((smallest, largest), (largest, smallest)):
        cases.append({word: ends[index % 2][word] for index, word in enumerate(dimensions)})
    if not any(len({1, *case.values()}) > len(case) for case in cases):
        cases.append(_different_lengths(dimensions))
    return [case for index, case in enumerate(cases) if case not in cases[:index]]


def _different_lengths(dimensions: Mapping[str, Range]) -> Lengths:
    """Return a length for each word that no other word has, and that is not 1, as far as the ranges allow."""
    found: Lengths = {}
    for word, bounds in dimensions.items():
        between = range(bounds["max"] - 1, bounds["min"], -1)
        candidates = itertools.chain((bounds["max"], bounds["opt"], bounds["min"]), between)
        found[word] = next((each for each in candidates if each not in {1, *found.values()}), bounds["max"])
    return found


def cases_to_check(interface: Interface, batches: list[int]) -> Iterator[tuple[int, Lengths]]:
    """Yield the batches and lengths that are run together: every batch at the tuned lengths, and the other lengths.

    Args:
        interface: The inputs.
        batches: The batches, ascending. The other lengths run at the first of them, or at two and more in turn.
    """
    tuned, *others = lengths_to_check(interface["dimensions"])
    yield from ((batch, tuned) for batch in batches)
    few = [batch for batch in batches if batch <= 3]
    yield from zip(itertools.cycle(few[1:2] + few[:1] + few[2:] if few else batches[:1]), others, strict=False)


def format_case(batch: int, lengths: Lengths) -> str:
    """Return "batch 2 at length 16" for messages. Without open dimensions only the batch."""
    if not lengths:
        return f"batch {batch}"
    if [*lengths] == ["height", "width"]:
        return f"batch {batch} of {lengths['height']}x{lengths['width']}"
    return f"batch {batch} at " + ", ".join(f"{word} {length}" for word, length in lengths.items())


def example_inputs(interface: Interface, batch: int, lengths: Lengths | None = None, seed: int = 0) -> "list[Any]":
    """Return reproducible inputs: values of the ranges of the spec, or standard normal ones.

    Strings are an array of NumPy, all other inputs are tensors.

    Args:
        interface: The inputs, resolved.
        batch: The number of samples.
        lengths: The lengths of open dimensions. Default: those to tune for.
        seed: Seed of the random generator.
    """
    lengths = tuned_lengths(interface["dimensions"]) if lengths is None else lengths
    return [
        random_values(each, [batch, *dims_at(each["shape"] or [], lengths)], seed + index)
        for index, each in enumerate(interface["inputs"])
    ]


def random_values(tensor: InputTensor, dims: list[int], seed: int) -> Any:
    """Return random values of one input, a tensor; an array of NumPy for strings."""
    import numpy as np
    import torch

    generator = torch.Generator().manual_seed(seed)
    if tensor["dtype"] == "string":
        texts = np.array(tensor["values"] or ["a", "b", "c"], dtype=object)
        return texts[torch.randint(0, len(texts), dims, generator=generator).numpy()]
    dtype: torch.dtype = getattr(torch, tensor["dtype"])
    if tensor["values"] is not None:
        choices = torch.tensor(tensor["values"], dtype=dtype)
        return choices[torch.randint(0, len(choices), dims, generator=generator)]
    low, high = tensor["low"], tensor["high"]
    if dtype.is_floating_point:
        if low is None and high is None:
            return torch.randn(*dims, generator=generator).to(dtype)
        least = 0.0 if low is None else low
        most = least + 1 if high is None else high
        return (torch.rand(*dims, generator=generator, dtype=torch.float64) * (most - least) + least).to(dtype)
    usual = 255 if dtype == torch.uint8 else 1
    first = int(low or 0)
    last = max(usual, first) if high is None else int(high)
    drawn = torch.uint8 if dtype == torch.uint8 else torch.int64
    return torch.randint(first, min(last + 1, 2**63 - 1), dims, generator=generator, dtype=drawn).to(dtype)
