"""The inputs of a network, as far as it shows them: its arguments, the file of torch.export, and trial runs.

    arguments of forward ─► candidates for each: token ids, a mask, a picture, a vector, … ─► the first that run
    open lengths ─► run at two other lengths
    largest id ─► run at the sizes of the network's tables

Nothing here is certain but what a file of torch.export records: each result says how it is known.
"""

import inspect
import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.errors import UserError, listed
from build_tasks.formats.pytorch_network import half_precision
from build_tasks.formats.torch_program import is_exported, load_program
from build_tasks.tensors import BATCH, Shape, dims_at

if TYPE_CHECKING:
    import torch

KNOWN, TRIED = "as the file has it", "found by trial: use the size of the training"
FILL_IN = "fill in: those that the file takes; no size that was tried fits"
TRIED_SIDES = (224, 256, 240, 288, 299, 320, 384, 448, 512, 640, 128, 112, 96, 64, 32, 28, 16)  # pixels
FEW_SIDES = (224, 64, 32)  # of a picture that is one of several inputs
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


class FoundInputs(NamedTuple):
    """All inputs of a network.

    Attributes:
        inputs: In the order of forward.
        comment: How they are known: KNOWN, TRIED or FILL_IN.
        picture: Whether the only input is a picture of float32, (channels, height, width).
        dimensions: The smallest and the largest length of open dimensions, where a file of torch.export records them;
            0 if there is no largest one.
        outputs: The name of each output, or its index, None for the only one; and the dimension of its batch. Empty if
            that is unknown.
        half: "float16" or "bfloat16" if the network computes in that type.
    """

    inputs: list[FoundInput]
    comment: str
    picture: bool = False
    dimensions: Mapping[str, tuple[int, int]] = {}  # a default that nobody changes
    outputs: Sequence[tuple[str | int | None, int]] = ()
    half: str | None = None


def inputs_of_file(path: str) -> FoundInputs:
    """Return the inputs of a file of TorchScript or torch.export.

    Raises:
        UserError: If torch cannot load the file, if it needs an argument that is no tensor, or one in bfloat16.
    """
    network: Any = load_program(path)
    if is_exported(path):
        found = _exported_inputs(path)
    else:
        types = {each.name: str(each.type) for each in network.program.forward.schema.arguments[1:]}
        found = _inputs_of(network, network.arguments, types, path)
    if narrow := [each.name for each in found.inputs if each.dtype == "bfloat16"]:
        raise UserError(f"{path}: {narrow[0]} is bfloat16, which Triton lacks for PyTorch: save the network in float32")
    return found._replace(half=half_precision(network))


def inputs_of_network(network: "torch.nn.Module", path: str) -> FoundInputs:
    """Return the inputs of a network of Python, in inference mode.

    Args:
        path: Its file, for messages.
    Raises:
        UserError: If forward needs an argument that is no tensor.
    """
    signature = inspect.signature(network.forward)
    types = {
        each.name: getattr(each.annotation, "__name__", str(each.annotation))
        for each in signature.parameters.values()
        if each.annotation is not each.empty
    }
    return _inputs_of(network, signature, types, path)


def _exported_inputs(path: str) -> FoundInputs:
    """Return what a file of torch.export records: names, types and dims. The first dimension is the batch."""
    import torch

    program = torch.export.load(path)
    users = program.graph_signature.user_inputs
    found, words = list[FoundInput](), dict[str, tuple[int, int]]()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name not in users or not isinstance(value, torch.Tensor):
            continue
        if value.ndim and all(isinstance(length, int) for length in value.shape):
            raise UserError(
                f"{path}: {node.name} has the fixed shape {list(value.shape)}, also its batch: export the network with "
                "an open batch, dynamic_shapes={…: {0: torch.export.Dim('batch')}}"
            )
        shape: Shape = []
        for axis, length in enumerate(list(value.shape)[1:], start=1):
            if isinstance(length, int):
                shape.append(length)
                continue
            symbol = length.node.expr
            bounds = program.range_constraints.get(symbol)
            word = re.sub(r"\W", "_", str(symbol))
            word = word if word != BATCH else f"{node.name}_{axis}"
            words[word] = (_bound(bounds and bounds.lower, 1), _bound(bounds and bounds.upper, 0))
            shape.append(word)
        found.append(FoundInput(str(node.name), str(value.dtype).removeprefix("torch."), shape))
    (first, *others) = found or [FoundInput("", "", None)]
    picture = not others and first.dtype == "float32" and len(first.shape or []) == 3
    if picture and words:  # [input] has sizes of its own in the place of words
        sizes: Shape = [length if isinstance(length, int) else 224 for length in first.shape or []]
        return FoundInputs([first._replace(shape=sizes)], TRIED, True)
    return FoundInputs(found, KNOWN, picture, words)


def _bound(bound: Any, default: int) -> int:
    """Return a bound of torch.export as an integer; the default if it is none, infinite, or too large for a length."""
    try:
        number = int(bound)
    except (TypeError, ValueError, OverflowError, AttributeError):  # the last of the infinity of torch.export
        return default
    return number if 0 < number < 2**31 else default


def _inputs_of(network: Any, signature: inspect.Signature, types: dict[str, str], path: str) -> FoundInputs:
    """Return the inputs of a network whose forward has this signature, by trial runs.

    Args:
        types: What the network says about the types of its arguments.
    Raises:
        UserError: If forward needs an argument that is no tensor.
    """
    names = _required(signature)
    takes = f"{path}: forward takes ({listed(signature.parameters)})"
    for name in names:
        if types.get(name) in ("int", "float", "bool", "str", "number"):
            raise UserError(
                f"{takes}, and {name} is {types[name]}, no tensor: give it a default in a network around it"
            )
    if not names:
        raise UserError(f"{takes}, and no argument with a name: expected one for each input")
    state = [*network.state_dict().values()]
    dtypes = ["float32", *filter(None, [half_precision(network)])]
    for dtype in dtypes:
        if len(names) == 1 and not _is_token(names[0]) and (shape := _picture_shape(network, state, dtype)):
            picture = [FoundInput(names[0], dtype, shape)]
            return FoundInputs(picture, TRIED, dtype == "float32", outputs=_outputs_of(network, picture))
        if found := _trial(network, names, state, dtype):
            return FoundInputs(found, TRIED, outputs=_outputs_of(network, found))
    if len(names) == 1 and dtypes == ["float32"] and any(tensor.ndim == 4 for tensor in state):
        return FoundInputs([FoundInput(names[0], "float32", [_first_channels(state), 224, 224])], FILL_IN, True)
    return FoundInputs([FoundInput(name, dtypes[-1], None) for name in names], FILL_IN)


def _required(signature: inspect.Signature) -> list[str]:
    """Return the arguments without a default. If all have one, as in Transformers: the first one, and its mask."""
    parameters = [
        each for each in signature.parameters.values() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    required = [each.name for each in parameters if each.default is each.empty]
    if required or not parameters:
        return required
    return [each.name for each in parameters if each is parameters[0] or each.name == "attention_mask"]


def _is_token(name: str) -> bool:
    return bool(re.search(r"ids?$|tokens?$|mask$", name))


def _first_channels(state: "Sequence[torch.Tensor]") -> int:
    return next((int(tensor.shape[1]) for tensor in state if tensor.ndim == 4), 3)


def _picture_shape(network: Any, state: "Sequence[torch.Tensor]", dtype: str) -> Shape | None:
    """Return the first usual size of a picture that a network with one input takes; None without one."""
    import torch

    for channels, side in itertools.product(dict.fromkeys((_first_channels(state), 3, 1)), TRIED_SIDES):
        if _runs(network, torch.zeros(2, channels, side, side, dtype=getattr(torch, dtype))):
            return [channels, side, side]
    return None


def _trial(network: Any, names: list[str], state: "Sequence[torch.Tensor]", floating: str) -> list[FoundInput]:
    """Return the first combination of candidates with which a network runs; nothing without one."""
    deadline = time.monotonic() + MAX_SECONDS
    for combination in itertools.product(*(list(_candidates(name, state, floating)) for name in names)):
        if time.monotonic() > deadline:
            break
        found = [FoundInput(name, dtype, shape) for name, (dtype, shape) in zip(names, combination, strict=True)]
        if not _runs(network, **_zeros(found)):
            continue
        if not all(_runs(network, **_zeros(found, lengths)) for lengths in LENGTHS[1:]):
            found = [each._replace(shape=[*dims_at(each.shape or [], LENGTHS[0])]) for each in found]
        return [_with_range(network, found, each, state) for each in found]
    return []


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
    pictures: list[tuple[str, Shape]] = [(floating, [_first_channels(state), side, side]) for side in FEW_SIDES]
    if _is_token(name):
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
        return _runs(network, **{**zeros, each.name: torch.full_like(zeros[each.name], value)})

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


def _outputs_of(network: Any, found: Sequence[FoundInput]) -> list[tuple[str | int | None, int]]:
    """Return the name or index of each output of a network, and the dimension that follows the batch.

    An answer in which a tensor has no such dimension, or several, gives nothing, since then the user must choose.
    """
    import torch

    from build_tasks.formats.network_answer import leaves_of

    try:
        with torch.inference_mode():
            answers = [dict(leaves_of(network(**_zeros(found, batch=batch)))) for batch in (2, 3)]
    except Exception:  # of the network, which may not take three samples, or names
        return []
    places = list[tuple[str | int | None, int]]()
    for path in answers[0]:
        shapes = [getattr(answer.get(path), "shape", ()) for answer in answers]
        axes = [axis for axis, lengths in enumerate(zip(*shapes, strict=False)) if lengths == (2, 3)]
        if len(axes) != 1 or len(shapes[0]) != len(shapes[1]):
            return []
        places.append((int(path) if path.isdecimal() else path or None, axes[0]))
    return places


def _runs(network: Any, *tensors: "torch.Tensor", **named: "torch.Tensor") -> bool:
    """Return whether a network runs with these inputs."""
    import torch

    try:
        with torch.inference_mode():
            network(*tensors, **named)
    except Exception:  # whatever a network raises for what it does not take
        return False
    return True
