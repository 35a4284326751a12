"""Networks that come as a file of their own: TorchScript, and torch.export. There is no Python code of the network.

    model.pt, model.pt2 ─► check_program ─► load_program ─► a network like any other, which is its own reference

Such a file is a program: loading and running it executes what it contains, as for a network in Python.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError, first_lines, listed
from build_tasks.formats.file_kinds import AOTI_PACKAGE, EXPORTED, TORCHSCRIPT, program_kind, reject_other_kinds
from build_tasks.runtime.limits import check_archive

if TYPE_CHECKING:
    import torch

# From the tensors of a network to the arguments of its program, by position and by name.
Arrange = Callable[[inspect.BoundArguments], tuple[tuple[Any, ...], dict[str, Any]]]


def check_program(path: str) -> str:
    """Return the path of a file with a network.

    Raises:
        UserError: If the file holds no network that can be loaded.
    """
    reject_other_kinds(path, "a network of PyTorch")
    check_archive(path)
    kind = program_kind(path)
    if kind == AOTI_PACKAGE:
        raise UserError(
            f"{path} is {kind}, which is compiled for one machine: save the network with torch.export.save instead"
        )
    if kind is None:
        raise UserError(
            f"{path} contains no network: expected TorchScript or torch.export, found another file; if it is a "
            "checkpoint, set architecture.timm or architecture.network; if torch.save wrote a whole network, save that "
            "with torch.export.save"
        )
    return path


def load_program(path: str) -> "torch.nn.Module":
    """Return the network of a file in inference mode, on the CPU.

    Raises:
        UserError: If torch cannot load the file.
    """
    import torch

    class Program(torch.nn.Module):
        """The network of the file."""

        def __init__(self, program: torch.nn.Module, arguments: inspect.Signature, arrange: Arrange):
            super().__init__()
            self.program = program
            self.arguments = arguments
            self.arrange = arrange

        def forward(self, *inputs: "torch.Tensor", **named: "torch.Tensor") -> object:
            bound = self.arguments.bind(*inputs, **named)  # a file of torch.export takes only what it was exported with
            args, kwargs = self.arrange(bound)
            try:
                return self.program(*args, **kwargs)
            except AssertionError as error:  # torch.export: the shape is not one that was exported
                shapes = ", ".join(str(list(each.shape)) for each in (*inputs, *named.values()))
                raise UserError(f"the network refuses {shapes}: {first_lines(error)}") from error

    load = {TORCHSCRIPT: _load_torchscript, EXPORTED: _load_exported}[program_kind(path) or TORCHSCRIPT]
    try:
        program = Program(*load(path))
    except UserError:
        raise
    except Exception as error:  # of torch, which has no common base class for a file that it cannot load
        raise UserError(f"{path} cannot be loaded by torch {torch.__version__}: {first_lines(error)}") from error
    for module in program.modules():
        module.training = False  # eval() is refused by networks of torch.export
    return program.requires_grad_(False)


def _load_torchscript(path: str) -> "tuple[torch.nn.Module, inspect.Signature, Arrange]":
    import torch

    module: Any = torch.jit.load(path, map_location="cpu")
    if not hasattr(module, "forward"):
        raise UserError(f"{path} has no method forward: script a network around it that calls the one to serve")
    _reject_training(path, _calls_of_graph(module.forward.inlined_graph))
    for each in module.forward.schema.arguments[1:]:  # the first is self
        if not each.has_default_value() and str(each.type).startswith(("List[", "Dict[", "Tuple[")):
            raise UserError(
                f"{path}: forward takes {each.name} as {each.type}: script a network around it that takes one tensor "
                "for each input, with the batch as first dimension"
            )
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(each.name, kind, default=each.default_value if each.has_default_value() else empty)
        for each in module.forward.schema.arguments[1:]  # the first is self
    ]
    return module, inspect.Signature(parameters), lambda bound: (bound.args, bound.kwargs)


def _load_exported(path: str) -> "tuple[torch.nn.Module, inspect.Signature, Arrange]":
    """Load a file of torch.export. Its arguments are its tensors; what else it was exported with, it gets unchanged."""
    import torch
    from torch.export.graph_signature import InputKind, TensorArgument
    from torch.utils._pytree import tree_unflatten

    program = torch.export.load(path)
    _reject_training(path, _calls_of_program(program))
    leaves: list[Any] = [each.arg for each in program.graph_signature.input_specs if each.kind == InputKind.USER_INPUT]
    structure = program.call_spec[0]  # of all arguments: those by position, and those by name
    count = structure.children()[0].num_leaves
    parameters = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, TensorArgument):
            kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if index < count else inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(leaf.name, kind))

    def arrange(bound: inspect.BoundArguments) -> "tuple[tuple[Any, ...], dict[str, Any]]":
        tensors = iter((*bound.args, *bound.kwargs.values()))
        values = [next(tensors) if isinstance(leaf, TensorArgument) else leaf.value for leaf in leaves]
        args, kwargs = tree_unflatten(values, structure)
        return args, kwargs

    return program.module(), inspect.Signature(parameters), arrange


def _reject_training(path: str, calls: Iterable[tuple[str, Mapping[str, object]]]) -> None:
    """Raise UserError if operators have the mode of training written into them, which no later eval() changes."""
    if names := sorted({name for name, arguments in calls if _is_training(arguments)}):
        raise UserError(
            f"{path} was saved in training mode, in which its answers are random or depend on the other samples of a "
            f"batch ({listed(names)}): call eval() on the network before it is traced or exported"
        )


def _is_training(arguments: Mapping[str, object]) -> bool:
    """Return whether an operator drops values, or takes the statistics of the batch although the network has its own.

    Args:
        arguments: By the names of the operator's schema: `train` or `training`; the rate `p`, `dropout` or `dropout_p`.
    """
    if "dropout_p" in arguments:  # of attention, which has no flag beside the rate
        return bool(arguments["dropout_p"])
    training = any(arguments.get(name) is True for name in ("train", "training"))
    is_batch_norm = "momentum" in arguments
    if is_batch_norm and arguments.get("running_mean") is None:
        return False
    return training and not any(arguments.get(name) == 0 for name in ("p", "dropout"))


def _calls_of_graph(graph: Any) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the operators of TorchScript, and by name those of their arguments that are constants or tensors.

    Those inside a branch are left out, since `if self.training` may guard them.
    """
    import torch

    for node in graph.nodes():
        if node.schema() == "(no schema)":
            continue
        arguments = dict[str, object]()
        for argument, value in zip(torch._C.parse_schema(node.schema()).arguments, node.inputs(), strict=False):
            if value.node().kind() == "prim::Constant":
                arguments[argument.name] = value.toIValue()
            elif value.type().kind() == "TensorType":
                arguments[argument.name] = value
        yield node.kind().rpartition("::")[2], arguments


def _calls_of_program(program: Any) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield the operators of a file of torch.export, and their arguments by name."""
    import torch

    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if isinstance(node.target, torch._ops.OpOverload):
                schema = node.target._schema
                names = [each.name for each in schema.arguments]
                yield schema.name.rpartition("::")[2], dict(zip(names, node.args, strict=False)) | node.kwargs


def is_exported(path: str) -> bool:
    """Return whether a file is one of torch.export."""
    return program_kind(path) == EXPORTED
