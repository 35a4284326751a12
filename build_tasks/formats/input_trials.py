"""Trial runs of a network, which show what its inputs may be.

arguments of forward ─► candidates for each: token ids, a mask, a picture, a vector, … ─► the first that run
open lengths ─► run at two other lengths
the batch ─► a sample alone has the answer that it has beside another one
largest id ─► run at the sizes of the network's tables
"""

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.errors import last_line, message_line
from build_tasks.tensors import Shape, dims_at

if TYPE_CHECKING:
    import torch

TRIED_SIDES = (224, 256, 240, 288, 299, 320, 384, 448, 512, 640, 128, 112, 96, 64, 32, 28, 16)  # pixels
FEW_SIDES = (224, 64, 32)  # of a picture that is one of several inputs
MAX_REASON = 160  # characters
MAX_SECONDS = 20.0  # that trial runs of several inputs may take
WORD, SAMPLES = "length", "samples"
LENGTHS = ({WORD: 16, SAMPLES: 16000}, {WORD: 24, SAMPLES: 24000}, {WORD: 9, SAMPLES: 8000})  # of trial runs


class FoundInput(NamedTuple):
    """One input: its shape without the batch, None if nothing that was tried fits; `high` is the largest token id."""

    name: str
    dtype: str
    shape: Shape | None
    high: int | None = None
    is_mask: bool = False
    batch_dimension: int = 0  # in the network
    reason: str = ""  # why nothing fits, as the network says of the likeliest candidate


def is_token(name: str) -> bool:
    return bool(re.search(r"ids?$|tokens?$|mask$", name))


def first_channels(state: "Sequence[torch.Tensor]") -> int:
    return next((int(tensor.shape[1]) for tensor in state if tensor.ndim == 4), 3)


def picture_shape(network: Any, state: "Sequence[torch.Tensor]", dtype: str) -> Shape | None:
    """Return the first usual size of a picture that a network with one input takes; None without one."""
    import torch

    for channels, side in itertools.product(dict.fromkeys((first_channels(state), 3, 1)), TRIED_SIDES):
        if runs(network, torch.zeros(2, channels, side, side, dtype=getattr(torch, dtype))):
            return [channels, side, side]
    return None


def find_inputs(network: Any, names: list[str], state: "Sequence[torch.Tensor]", floating: str) -> list[FoundInput]:
    """Return the first combination of candidates with which a network runs, each sample by itself.

    Without one it is the first with which the network runs at all, and nothing if there is none.
    """
    first = list[FoundInput]()
    deadline = time.monotonic() + MAX_SECONDS
    for combination in itertools.product(*(list(_candidates(name, state, floating)) for name in names)):
        if time.monotonic() > deadline:
            break
        found = [FoundInput(name, dtype, shape) for name, (dtype, shape) in zip(names, combination, strict=True)]
        if not runs(network, **_zeros(found)):
            continue
        if not all(runs(network, **_zeros(found, lengths)) for lengths in LENGTHS[1:]):
            found = [each._replace(shape=[*dims_at(each.shape or [], LENGTHS[0])]) for each in found]
        if _keeps_samples_apart(network, found):
            first = found
            break
        first = first or found
    return [_with_range(network, first, each, state) for each in first]


def _keeps_samples_apart(network: Any, found: Sequence[FoundInput]) -> bool:
    """Return whether the second of two samples has the same answer alone.

    Otherwise the first dimension is none of samples: an LSTM takes (time, width) as one sequence without a batch.
    """
    import torch

    from build_tasks.formats.network_answer import leaves_of

    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.rand(tensor.shape, generator=generator).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in _zeros(found).items()
    }
    try:
        with torch.inference_mode():
            together = dict(leaves_of(network(**inputs)))
            alone = dict(leaves_of(network(**{name: tensor[1:] for name, tensor in inputs.items()})))
        axes = _batch_axes(network, found)
        return bool(axes) and all(
            torch.allclose(together[path].narrow(axis, 1, 1), alone[path], rtol=1e-2, atol=1e-4, equal_nan=True)
            for path, axis in axes.items()
        )
    except Exception:  # of the network, which may not take one sample; or the two answers have other shapes
        return False


def _candidates(name: str, state: "Sequence[torch.Tensor]", floating: str) -> Iterator[tuple[str, Shape]]:
    """Yield types and shapes that an argument may have, the likeliest for its name first."""
    widths = dict.fromkeys(int(tensor.shape[1]) for tensor in state if tensor.ndim == 2)
    channels = dict.fromkeys(int(tensor.shape[1]) for tensor in state if tensor.ndim == 3)
    tokens: list[tuple[str, Shape]] = [("int64", [WORD]), ("bool", [WORD])]
    floats: list[tuple[str, Shape]] = [(floating, [width]) for width in widths]
    floats += [(floating, [WORD, width]) for width in widths]
    floats += [(floating, [count, WORD]) for count in channels]
    sound: tuple[str, Shape] = (floating, [SAMPLES])
    floats = [sound, *floats] if re.search(r"audio|wav|sound|speech|signal|pcm", name) else [*floats, sound]
    floats.append((floating, []))
    pictures: list[tuple[str, Shape]] = [(floating, [first_channels(state), side, side]) for side in FEW_SIDES]
    if is_token(name):
        yield from (*tokens, *floats, *pictures)
    elif re.search(r"image|img|pixel|picture|frame|photo", name):
        yield from (*pictures, *floats, *tokens)
    else:
        yield from (*floats, *tokens, *pictures)


def _with_range(network: Any, found: list[FoundInput], each: FoundInput, state: "Sequence[torch.Tensor]") -> FoundInput:
    """Return an input with its largest value, if it is an index into a table of the network."""
    import torch

    if each.dtype != "int64":
        return each
    if "mask" in each.name:
        return each._replace(is_mask=True)

    def runs_with(value: int) -> bool:
        zeros = _zeros(found)
        return runs(network, **{**zeros, each.name: torch.full_like(zeros[each.name], value)})

    return each._replace(high=largest_index(runs_with, (int(tensor.shape[0]) for tensor in state if tensor.ndim == 2)))


def largest_index(runs_with: Callable[[int], bool], sizes: Iterable[int]) -> int | None:
    """Return the largest index that a network takes, if it is the last one of one of its tables.

    Args:
        runs_with: Whether the network runs with an index.
        sizes: The number of rows of each table.
    """
    for size in sorted({*sizes}, reverse=True):
        if size > 1 and runs_with(size - 1):
            return None if runs_with(size) else size - 1
    return None


def _zeros(
    found: Sequence[FoundInput], lengths: Mapping[str, int] = LENGTHS[0], batch: int = 2
) -> "dict[str, torch.Tensor]":
    """Return samples of zeros for each input; masks are ones."""
    import torch

    tensors = {}
    for each in found:
        create = torch.ones if "mask" in each.name else torch.zeros
        tensors[each.name] = create([batch, *dims_at(each.shape or [], lengths)], dtype=getattr(torch, each.dtype))
    return tensors


def outputs_of(network: Any, found: Sequence[FoundInput]) -> list[tuple[str | int | None, int]]:
    """Return the name or index of each output of a network, and the dimension that follows the batch."""
    axes = _batch_axes(network, found)
    return [(int(path) if path.isdecimal() else path or None, axis) for path, axis in axes.items()]


def _batch_axes(network: Any, found: Sequence[FoundInput]) -> dict[str, int]:
    """Return the dimension that follows the batch, for each tensor of a network's answer.

    An answer in which a tensor has no such dimension, or several, gives nothing, since then the user must choose.
    """
    import torch

    from build_tasks.formats.network_answer import leaves_of

    try:
        with torch.inference_mode():
            answers = [dict(leaves_of(network(**_zeros(found, batch=batch)))) for batch in (2, 3)]
    except Exception:  # of the network, which may not take three samples, or names
        return {}
    places = dict[str, int]()
    for path in answers[0]:
        shapes = [getattr(answer.get(path), "shape", ()) for answer in answers]
        axes = [axis for axis, lengths in enumerate(zip(*shapes, strict=False)) if lengths == (2, 3)]
        if len(axes) != 1 or len(shapes[0]) != len(shapes[1]):
            return {}
        places[path] = axes[0]
    return places


def runs(network: Any, *tensors: "torch.Tensor", **named: "torch.Tensor") -> bool:
    """Return whether a network runs with these inputs."""
    return error_of(network, *tensors, **named) is None


def error_of(network: Any, *tensors: "torch.Tensor", **named: "torch.Tensor") -> Exception | None:
    """Return the error that a network raises with these inputs, None if it runs."""
    import torch

    try:
        with torch.inference_mode():
            network(*tensors, **named)
    except Exception as error:  # whatever a network raises for what it does not take
        return error
    return None


def reason_of(network: Any, found: Sequence[FoundInput]) -> str:
    """Return what a network says of inputs that it does not take, in one line; "" if it takes them."""
    error = error_of(network, **_zeros(found))
    return message_line(last_line(error), MAX_REASON) if error else ""
