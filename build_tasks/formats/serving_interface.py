"""The interface of a spec around a network: what clients send, what forward takes, and which tensors are served.

    inputs, batch first ─► normalized ─► batch where the network has it ─► arguments of forward
    answer: a tensor, tuple, dict, dataclass ─► the tensors of [[outputs]] ─► batch first ─► softmax, top_k

All of it is hooks of the network, so that its layers keep their names in every format.
"""

import contextlib
import inspect
import traceback
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, kind_and_reason, listed, with_suggestion
from build_tasks.formats.example_inputs import example_inputs, lengths_to_check
from build_tasks.formats.network_answer import kind_of, select_tensors
from build_tasks.formats.picture_transform import data_config
from build_tasks.paths import MODELS
from build_tasks.tensors import OUTPUT, Interface, Shape, misplaced_batch

if TYPE_CHECKING:
    import torch


def resolve_interface(module: "torch.nn.Module", interface: Interface) -> Interface:
    """Return the interface with the size of pictures that only timm knows."""
    (first, *others) = interface["inputs"]
    if first["shape"] is not None:
        return interface
    shape: Shape = [*data_config(module, {})["input_size"]]
    if first["layout"] == "nhwc":
        shape = [*shape[1:], shape[0]]
    return {**interface, "inputs": [{**first, "shape": shape}, *others]}


def wrap_for_serving(module: "torch.nn.Module", interface: Interface) -> "torch.nn.Module":
    """Add the interface of the spec to a network, as hooks.

    The network then takes one tensor for each input, in their order, and answers with a tensor or a tuple of tensors,
    because Triton's PyTorch backend takes no list and no dict. A uint8 picture (batch, height, width, channels) is
    normalized; a float32 one (batch, channels, height, width) still passes unchanged. The attribute `output_names` is
    set whenever it has run.

    Args:
        module: The network.
        interface: The interface of the spec.
    Raises:
        UserError: If forward does not take the inputs; when it runs, if its answer does not have the outputs.
    """
    names = bind_names(module, interface)
    batch_dimensions = [each["batch_dimension"] for each in interface["inputs"]]
    if interface["normalization"]:
        module.register_forward_pre_hook(lambda _, inputs: (normalize_input(module, inputs[0], interface), *inputs[1:]))
    if any(batch_dimensions):
        module.register_forward_pre_hook(
            lambda _, inputs: tuple(
                each.movedim(0, axis) if axis else each for each, axis in zip(inputs, batch_dimensions, strict=True)
            )
        )
    if names:
        module.register_forward_pre_hook(
            lambda _, inputs, named: ((), {**named, **dict(zip(names, inputs, strict=True))}), with_kwargs=True
        )
    module.register_forward_hook(lambda _, inputs, answer: _serve(module, answer, interface))
    return module


def output_names(module: "torch.nn.Module") -> list[str]:
    """Return the names of what a network with the interface of the spec has answered with last."""
    names: list[str] = getattr(module, "output_names")  # noqa: B009  # torch types attributes of modules as tensors
    return names


def bind_names(module: "torch.nn.Module", interface: Interface) -> list[str]:
    """Return the arguments of forward by which the inputs are passed; none if they are passed in their order.

    As in Triton's PyTorch backend, inputs are matched by name if all their names are arguments of forward, and by their
    order if none is.

    Raises:
        UserError: If forward cannot be called with the inputs.
    """
    inputs = [each["name"] for each in interface["inputs"]]
    signature: inspect.Signature = getattr(module, "arguments", None) or inspect.signature(module.forward)
    parameters = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    arguments = [each.name for each in parameters if each.kind is not each.VAR_POSITIONAL]
    described = listed(f"{each['name']} {each['dtype']}{_format_shape(each['shape'])}" for each in interface["inputs"])
    takes = f"forward takes {_format_signature(signature)}, and the spec gives {described}"
    matching = [name for name in inputs if name in arguments]
    if matching and len(matching) < len(inputs):
        wrong = next(name for name in inputs if name not in arguments)
        raise UserError(f"inputs: there is no argument {with_suggestion(wrong, arguments)}: {takes}")
    keyword_only = any(each.kind is each.KEYWORD_ONLY and each.name in matching for each in parameters)
    by_name = bool(matching) and (keyword_only or inputs != arguments[: len(inputs)])
    try:
        signature.bind(*(() if by_name else inputs), **(dict.fromkeys(inputs) if by_name else {}))
    except TypeError as error:
        raise UserError(f"inputs: {error}: {takes}; describe every input in [[inputs]]") from error
    return inputs if by_name else []


def _format_signature(signature: inspect.Signature) -> str:
    """Return the arguments of forward, each with "=…" if it has a default."""
    stars = {inspect.Parameter.VAR_POSITIONAL.name: "*", inspect.Parameter.VAR_KEYWORD.name: "**"}
    texts = [
        f"{stars.get(each.kind.name, '')}{each.name}" + ("=…" if each.default is not each.empty else "")
        for each in signature.parameters.values()
    ]
    return f"({listed(texts)})"


def _format_shape(shape: Shape | None) -> str:
    return "" if shape is None else f"[{', '.join(map(str, ['batch', *shape]))}]"


def _serve(module: "torch.nn.Module", answer: Any, interface: Interface) -> Any:
    """Return what is served of an answer: a tensor, or a tuple of them. Names go into `module.output_names`."""
    import torch

    if interface["softmax"] or interface["top_k"]:
        answer = top_k_outputs(answer if not interface["outputs"] else select_tensors(answer, interface)[1], interface)
        tensors = [answer] if isinstance(answer, torch.Tensor) else [*answer]
        module.output_names = [OUTPUT.format(index) for index in range(len(tensors))]  # type: ignore[assignment]
        return answer
    names, served = select_tensors(answer, interface)
    if both := {each["name"] for each in interface["inputs"]}.intersection(names):
        found = f"an output called {min(both)}, as an input is"
        raise UserError(f"the network answers with {found}; give it another name: `name` and `key` of [[outputs]]")
    module.output_names = names  # type: ignore[assignment]
    return served


def normalize_input(module: "torch.nn.Module", batch: "torch.Tensor", interface: Interface) -> "torch.Tensor":
    """Return uint8 (batch, height, width, channels) as normalized float32 (batch, channels, height, width).

    A float32 batch is already normalized and comes back unchanged. The mean is subtracted before the division, because
    in fp16 this difference is exact except for the rounding of the mean.
    """
    import torch

    if batch.dtype != torch.uint8:
        return batch
    config = data_config(module, dict(interface["normalization"] or {}))
    factor: float = 255 / config.get("scale", 1)
    mean, std = (torch.tensor(config[key], dtype=torch.float64).reshape(-1, 1, 1) * factor for key in ("mean", "std"))
    # The cast comes first: it is the only operator of TensorRT that takes bytes.
    return (batch.float().permute(0, 3, 1, 2) - mean.float()) * (1 / std).float()


def top_k_outputs(output: Any, interface: Interface) -> Any:
    """Return the output as probabilities, or as its `top_k` largest values and their classes.

    Raises:
        UserError: If the output is not one tensor (batch, classes), or has fewer classes.
    """
    import torch

    if isinstance(output, tuple | list) and len(output) == 1:
        (output,) = output
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        found = f"shape {list(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise UserError(f"output: softmax and top_k need one output of (batch, classes), and the network's is {found}")
    output = output.softmax(dim=1) if interface["softmax"] else output
    if interface["top_k"] is None:
        return output
    if interface["top_k"] > output.shape[1]:
        raise UserError(f"output.top_k: {interface['top_k']} of {output.shape[1]} classes")
    return tuple(output.topk(interface["top_k"], dim=1))


def forward(module: Any, inputs: "Sequence[torch.Tensor]") -> "list[torch.Tensor]":
    """Run a network with the interface of its spec, or an artifact of it, and return its outputs in their order.

    Args:
        module: The network.
        inputs: A batch of each input.
    Raises:
        UserError: If the outputs are not tensors whose first dimension is the batch, or are of a type that NumPy lacks.
    """
    import torch

    with torch.inference_mode():
        outputs = module(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    if not isinstance(outputs, tuple | list) or not all(isinstance(output, torch.Tensor) for output in outputs):
        raise UserError(f"the network answers with {kind_of(outputs)}; Triton needs one tensor, or a tuple of them")
    batch = len(inputs[0])
    for index, output in enumerate(outputs):
        dtype = str(output.dtype).removeprefix("torch.")
        if output.layout != torch.strided or dtype == "bfloat16" or output.is_complex() or output.is_quantized:
            found = dtype if output.layout == torch.strided else str(output.layout).removeprefix("torch.")
            raise UserError(f"output {index} is {found}, which Triton's clients and NumPy do not have; cast it")
        if output.ndim == 0 or output.shape[0] != batch:
            raise UserError(misplaced_batch(f"output {index}", output.shape, batch))
    return list(outputs)


@contextlib.contextmanager
def explain_errors(inputs: Sequence[Any]) -> Iterator[None]:
    """Context manager in which an error of the network itself is told in one line. The traceback goes to the log.

    Args:
        inputs: The batch of each input that the network gets.
    Raises:
        UserError: If the network raises an error, with the line in the user's code.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever a network raises
        traceback.print_exc()
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(f"{MODELS}/")]
        where = f"{frames[-1].filename}, line {frames[-1].lineno}: " if frames else ""
        problem = f"the network does not run on {format_inputs(inputs)}: {kind_and_reason(error)}"
        raise UserError(where + problem) from error


def format_inputs(inputs: Sequence[Any]) -> str:
    """Return the types and shapes of some inputs, "float32[2, 3, 224, 224], int64[2, 16]"."""
    return ", ".join(f"{str(each.dtype).removeprefix('torch.')}{list(each.shape)}" for each in inputs)


def open_output_axes(module: Any, interface: Interface) -> list[dict[int, str | None]]:
    """Return, for each output, the axes besides the batch whose length depends on the lengths of open dimensions.

    The value of an axis is the word that has this length in all runs; None if there is none. The network runs once at
    each of `lengths_to_check`.
    """
    lengths = lengths_to_check(interface["dimensions"])
    runs = [forward(module, example_inputs(interface, 1, case)) for case in lengths]
    found: list[dict[int, str | None]] = []
    for outputs in zip(*runs, strict=True):
        axes: dict[int, str | None] = {}
        for axis in range(1, outputs[0].ndim):
            sizes = [output.shape[axis] for output in outputs]
            if len(set(sizes)) > 1:
                words = (word for word in interface["dimensions"] if [case[word] for case in lengths] == sizes)
                axes[axis] = next(words, None)
        found.append(axes)
    return found


def open_axes(shape: Shape) -> dict[int, str]:
    """Return the words of an input's open dimensions by their axis, with the batch as axis 0."""
    return {axis: dim for axis, dim in enumerate(shape, start=1) if isinstance(dim, str)}
