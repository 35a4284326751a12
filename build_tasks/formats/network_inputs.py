"""The inputs of a network, as far as it shows them: its arguments, the file of torch.export, and trial runs.

    file of torch.export ─► what it records
    arguments of forward ─► trial runs (input_trials.py)

Nothing here is certain but what a file of torch.export records: each result says how it is known.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from build_tasks.errors import UserError, listed
from build_tasks.formats.input_trials import (
    TRIED_SIDES,
    FoundInput,
    find_inputs,
    first_channels,
    is_token,
    outputs_of,
    picture_shape,
    reason_of,
    runs,
)
from build_tasks.formats.pytorch_network import half_precision
from build_tasks.formats.torch_program import is_exported, load_program
from build_tasks.tensors import BATCH, Shape

if TYPE_CHECKING:
    import torch

KNOWN, TRIED = "as the file has it", "found by trial: use the size of the training"
FILL_IN = "fill in: those that the file takes; no size that was tried fits"


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
        max_batch: The largest batch that a file of torch.export takes; None if it records none.
    """

    inputs: list[FoundInput]
    comment: str
    picture: bool = False
    dimensions: Mapping[str, tuple[int, int]] = {}  # a default that nobody changes
    outputs: Sequence[tuple[str | int | None, int]] = ()
    half: str | None = None
    max_batch: int | None = None


def inputs_of_file(path: str) -> FoundInputs:
    """Return the inputs of a file of TorchScript or torch.export.

    Raises:
        UserError: If torch cannot load the file, if it needs an argument that is no tensor, or one in bfloat16.
    """
    network: Any = load_program(path)
    if is_exported(path):
        found = _exported_inputs(path, network)
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


def _exported_inputs(path: str, network: Any) -> FoundInputs:
    """Return what a file of torch.export records: names, types and dims. The first dimension is the batch."""
    import torch

    program = torch.export.load(path)
    users = program.graph_signature.user_inputs
    found, words, batches = list[FoundInput](), dict[str, tuple[int, int]](), list[int]()

    def bounds_of(length: Any) -> tuple[int, int]:
        bounds = program.range_constraints.get(length.node.expr)
        return _bound(bounds and bounds.lower, 1), _bound(bounds and bounds.upper, 0)

    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name not in users or not isinstance(value, torch.Tensor):
            continue
        if value.ndim and all(isinstance(length, int) for length in value.shape):
            raise UserError(
                f"{path}: {node.name} has the fixed shape {list(value.shape)}, also its batch: export the network with "
                "an open batch, dynamic_shapes={…: {0: torch.export.Dim('batch')}}"
            )
        batches += [bounds_of(length)[1] for length in value.shape[:1] if not isinstance(length, int)]
        shape: Shape = []
        for axis, length in enumerate(list(value.shape)[1:], start=1):
            if isinstance(length, int):
                shape.append(length)
                continue
            word = re.sub(r"\W", "_", str(length.node.expr))
            word = word if word != BATCH else f"{node.name}_{axis}"
            words[word] = bounds_of(length)
            shape.append(word)
        found.append(FoundInput(str(node.name), str(value.dtype).removeprefix("torch."), shape))
    (first, *others) = found or [FoundInput("", "", None)]
    picture = not others and first.dtype == "float32" and len(first.shape or []) == 3
    max_batch = min(filter(None, batches), default=None)
    if picture and words:  # [input] has sizes of its own in the place of words
        smallest = [words[length][0] for length in first.shape or [] if isinstance(length, str)]
        candidates = [
            [length if isinstance(length, int) else side for length in first.shape or []]
            for side in (*TRIED_SIDES, *smallest)
        ]
        fitting = next((sizes for sizes in candidates if runs(network, torch.zeros(2, *sizes))), None)
        picture_input = first._replace(shape=[*(fitting or candidates[-1])])
        return FoundInputs([picture_input], TRIED if fitting else FILL_IN, True, max_batch=max_batch)
    return FoundInputs(found, KNOWN, picture, words, max_batch=max_batch)


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
        if len(names) == 1 and not is_token(names[0]) and (shape := picture_shape(network, state, dtype)):
            picture = [FoundInput(names[0], dtype, shape)]
            return FoundInputs(picture, TRIED, dtype == "float32", outputs=outputs_of(network, picture))
        if found := find_inputs(network, names, state, dtype):
            return FoundInputs(found, TRIED, outputs=outputs_of(network, found))
    picture = [FoundInput(name, dtypes[-1], [first_channels(state), 224, 224]) for name in names]
    reason = reason_of(network, picture)
    if len(names) == 1 and dtypes == ["float32"] and any(tensor.ndim == 4 for tensor in state):
        return FoundInputs(picture, f"{FILL_IN}: {reason}" if reason else FILL_IN, True)
    return FoundInputs([FoundInput(name, dtypes[-1], None, reason=reason) for name in names], FILL_IN)


def _required(signature: inspect.Signature) -> list[str]:
    """Return the arguments without a default. If all have one, as in Transformers: the first one, and its mask."""
    parameters = [
        each for each in signature.parameters.values() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    required = [each.name for each in parameters if each.default is each.empty]
    if required or not parameters:
        return required
    return [each.name for each in parameters if each is parameters[0] or each.name == "attention_mask"]
