"""Networks as programs of torch.export, with an open batch, and their cast to another precision.

    network ─► export_arguments ─► torch.export ─► fp32 program ─► cast_program ─► program in fp16 or bf16

A cast program takes and answers with the same types as the network. The rules are those of the cast of TorchScript
files (see torchscript_graph.py): values are cast at the border, and outputs before softmax and top-k.
"""

from typing import TYPE_CHECKING, Any

from build_tasks.formats.example_inputs import example_inputs
from build_tasks.formats.pytorch_network import takes_any_number
from build_tasks.formats.serving_interface import open_axes
from build_tasks.tensors import BATCH, Interface, tuned_lengths

if TYPE_CHECKING:
    import torch


def export_arguments(
    network: "torch.nn.Module", interface: Interface, batch: int, open_batch: bool, largest_batch: int | None = None
) -> tuple[tuple[Any, ...], Any]:
    """Return an example of the inputs of a network, and its `dynamic_shapes` for torch.export, None if none is open.

    Args:
        network: The network, with the interface of the spec.
        interface: The interface of the spec, resolved.
        batch: The batch of the example. It is at least 2 if the batch is open, because torch.export fixes a dimension
            of size one, also if it is declared as open.
        open_batch: Whether the batch is open.
        largest_batch: The largest batch, None if there is no limit.
    """
    import torch

    batch = max(2, batch) if open_batch else batch
    dimensions = interface["dimensions"]
    lengths = {
        word: max(length, min(2, bounds["max"]))
        for (word, length), bounds in zip(tuned_lengths(dimensions).items(), dimensions.values(), strict=True)
    }
    words = {word: torch.export.Dim(word, min=bounds["min"], max=bounds["max"]) for word, bounds in dimensions.items()}
    limits = {} if largest_batch is None else {"min": 1, "max": max(batch, largest_batch)}
    first = {0: torch.export.Dim(BATCH, **limits)} if open_batch else {}
    axes_of_inputs = [open_axes(each["shape"] or []) for each in interface["inputs"]]
    shapes = tuple({**first, **{axis: words[word] for axis, word in axes.items()}} for axes in axes_of_inputs)
    example = tuple(example_inputs(interface, batch, lengths))
    return example, as_dynamic_shapes(network, shapes) if any(shapes) else None


def as_dynamic_shapes(network: "torch.nn.Module", shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the open dimensions of each input as torch.export takes them for a network."""
    return (shapes,) if takes_any_number(network) else shapes  # *inputs are one argument for torch.export


def cast_program(
    program: "torch.export.ExportedProgram", dtype: "torch.dtype", pictures: list[bool], dynamic_shapes: Any
) -> "torch.export.ExportedProgram":
    """Return a program in another precision. Pictures (batch, channels, height, width) and filters are channels last.

    Args:
        program: In fp32.
        dtype: The type that takes the place of fp32.
        pictures: For each input whether it is a picture (batch, channels, height, width).
        dynamic_shapes: Those with which the program was exported.
    """
    import torch

    aten = torch.ops.aten
    module: Any = program.module(check_guards=False)
    graph: torch.fx.Graph = module.graph
    _cast_tensors(module, dtype)
    # These hold the values of the fp32 program, by which the inputs and outputs to cast are found.
    dtypes = {node: node.meta["val"].dtype for node in graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    for node in graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = torch.fx.node.map_aggregate(
                (node.args, node.kwargs), lambda value: dtype if value is torch.float32 else value
            )
            if node.target is aten.view.default:  # it cannot join dimensions that are not adjacent in memory
                node.target = aten.reshape.default
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, is_picture in zip(placeholders, pictures, strict=True):
        if dtypes[node] == torch.float32:
            with graph.inserting_before(_first_operator(graph)):
                cast = graph.call_function(aten.to.dtype, (node, dtype))
                if is_picture:
                    cast = graph.call_function(aten.contiguous.default, (cast,), {"memory_format": torch.channels_last})
            node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user not in (cast, *cast.args))
    (result,) = (node for node in graph.nodes if node.op == "output")
    for node in dict.fromkeys(result.all_input_nodes):
        user, value = _before_ranking(node, result)
        is_cast = value.target is aten.to.dtype and value.args[1] is torch.float32  # the border of another output
        if dtypes.get(value) == torch.float32 and not is_cast:
            with graph.inserting_before(user):
                user.replace_input_with(value, graph.call_function(aten.to.dtype, (value, torch.float32)))
    graph.lint()
    module.recompile()
    if program.example_inputs is None:
        raise ValueError("a program without example inputs cannot be exported again")
    arguments, _ = program.example_inputs
    return torch.export.export(module, tuple(arguments), dynamic_shapes=dynamic_shapes)


def _cast_tensors(module: Any, dtype: "torch.dtype") -> None:
    """Cast the fp32 parameters, buffers and constants of a module. Filters get the memory format channels last."""
    import torch

    for name in {node.target for node in module.graph.nodes if node.op == "get_attr"}:
        owner, _, attribute = name.rpartition(".")
        holder = module.get_submodule(owner)
        value = getattr(holder, attribute)
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            continue
        cast = value.detach().to(dtype)
        if cast.ndim == 4:
            cast = cast.contiguous(memory_format=torch.channels_last)
        is_parameter = isinstance(value, torch.nn.Parameter)
        setattr(holder, attribute, torch.nn.Parameter(cast, requires_grad=False) if is_parameter else cast)


def _first_operator(graph: "torch.fx.Graph") -> Any:
    return next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))


def _before_ranking(node: Any, result: Any) -> tuple[Any, Any]:
    """Return the node before which an output is cast back, and the value that is cast: before softmax and top-k.

    In fp16 many probabilities equal their neighbors, so the order of the strongest classes would be arbitrary.

    Args:
        node: The output.
        result: The node that returns the outputs.
    """
    import operator

    import torch

    ranking = {torch.ops.aten.topk.default, torch.ops.aten.softmax.int}
    user, value = result, node
    while True:
        source = value.args[0] if value.target is operator.getitem else value
        if source.target not in ranking:
            return user, value
        user, value = source, source.args[0]
