"""Optimization profiles of an engine: what they take together, and the one that Triton uses for a request.

promised batches and lengths ─┐
profiles ─────────────────────┴► what no profile takes

An engine is tuned for one point of each profile. An execution uses one profile, and must lie within its ranges.
"""

from collections.abc import Iterable, Mapping, Sequence

from build_tasks.tensors import BATCH, OptimizationProfile, ProfileShapes, Range

Box = dict[str, tuple[int, int]]  # the smallest and the largest length by word; the batch is one of the words


def box_of(profile: OptimizationProfile) -> Box:
    """Return the batches and lengths that a profile takes."""
    ranges: dict[str, Range] = {BATCH: profile["batch"], **profile["dimensions"]}
    return {word: (bounds["min"], bounds["max"]) for word, bounds in ranges.items()}


def find_uncovered(promised: Box, profiles: Iterable[OptimizationProfile]) -> Box | None:
    """Return batches and lengths that clients may send and that no profile takes; None if there are none.

    One profile alone must take each request. So a large batch of short inputs and a small batch of long ones do not
    cover a large batch of long inputs.
    """
    left = [promised]
    for profile in profiles:
        left = [piece for box in left for piece in _subtract(box, box_of(profile))]
    return left[0] if left else None


def _subtract(box: Box, other: Box) -> list[Box]:
    """Return the parts of a box that are not in another one. They do not overlap."""
    if any(least > other[word][1] or most < other[word][0] for word, (least, most) in box.items()):
        return [box]
    parts, rest = [], dict(box)
    for word, (first, last) in other.items():
        least, most = rest[word]
        if least < first:
            parts.append({**rest, word: (least, first - 1)})
        if most > last:
            parts.append({**rest, word: (last + 1, most)})
        rest[word] = max(least, first), min(most, last)
    return parts


def format_box(box: Box) -> str:
    """Return "batch 9 to 32, length 129 to 512" for messages."""
    return ", ".join(f"{word} {least}" + (f" to {most}" if most > least else "") for word, (least, most) in box.items())


def nearest_profile(profiles: Sequence[Mapping[str, ProfileShapes]], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return the index of the profile that Triton uses for a request; None if no profile takes it.

    It is the one whose tuned shapes are nearest to those of the request, by the sum of all differences; the first of
    several. Source: GetMostOptimizedProfile in src/instance_state.cc of Triton's tensorrt_backend.

    Args:
        profiles: As in the signature of an engine.
        shapes: The shape of each input, with the batch.
    """
    distances = {index: _distance(profile, shapes) for index, profile in enumerate(profiles)}
    fitting = {index: distance for index, distance in distances.items() if distance is not None}
    return min(fitting, key=fitting.__getitem__) if fitting else None


def _distance(profile: Mapping[str, ProfileShapes], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return how far shapes are from those that a profile is tuned for; None if they are outside of it."""
    total = 0
    for name, points in profile.items():
        dims = zip(shapes[name], points["min"], points["opt"], points["max"], strict=True)
        for length, least, tuned, most in dims:
            if not least <= length <= most:
                return None
            total += abs(length - tuned)
    return total
