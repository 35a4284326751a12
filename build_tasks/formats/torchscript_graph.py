"""TorchScript files: saved without paths of this machine, cast to another precision, and run with a GPU's rounding.

    model.pt ─► cast_trace ─► save_torchscript ─► model.fp16.pt ─► run_with_gpu_rounding, on a CPU

This module imports PyTorch and nothing of the project.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

CONVOLUTIONS = {"aten::_convolution", "aten::convolution", "aten::conv2d"}

# The numbers of dtypes and memory formats in TorchScript. Source: c10/core/ScalarType.h and MemoryFormat.h.
DTYPE_NUMBERS = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
CHANNELS_LAST_NUMBER = 2

# Operators that add up products. Which of them PyTorch calls depends on the caller.
PRODUCT_OPERATORS = {
    *("conv1d", "conv2d", "conv3d", "convolution", "_convolution"),
    *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
    *("cudnn_convolution_relu", "cudnn_convolution_add_relu"),
}


def _convolution_relu(
    image: torch.Tensor, filters: torch.Tensor, bias: torch.Tensor | None, *options: Any
) -> torch.Tensor:
    return torch.conv2d(image, filters, bias, *options).relu()


def _convolution_add_relu(
    image: torch.Tensor,
    filters: torch.Tensor,
    other: torch.Tensor,
    factor: float,
    bias: torch.Tensor | None,
    *options: Any,
) -> torch.Tensor:
    if other.shape != (result := torch.conv2d(image, filters, bias, *options)).shape:
        raise RuntimeError(f"cudnn_convolution_add_relu adds {list(other.shape)} to {list(result.shape)}")
    return (result + factor * other).relu()


# Operators that have no kernel for a CPU. The result of the convolution is not rounded before the ReLU.
CPU_FUNCTIONS = {
    "cudnn_convolution_relu": _convolution_relu,
    "cudnn_convolution_add_relu": _convolution_add_relu,
}

# The second is for files that an older PyTorch cannot read, for example with attention.
VERSION_RECORDS = {"version", ".data/version"}


def save_torchscript(module: torch.jit.ScriptModule, path: str) -> None:
    """Save a module like torch.jit.save, but without the debug records, which contain paths of this machine."""
    draft = f"{path}.draft/{path.rpartition('/')[2]}"  # the names of the archive's records begin with the file's stem
    os.makedirs(os.path.dirname(draft))
    torch.jit.save(module, draft)
    reader = torch._C.PyTorchFileReader(draft)
    writer = torch._C.PyTorchFileWriter(path)
    # The meaning of operators, such as the division of integers, depends on the version. It must stay the same.
    (version,) = VERSION_RECORDS & {*reader.get_all_records()}
    writer.set_min_version(int(reader.get_record(version)))
    for name in reader.get_all_records():
        if not name.endswith(".debug_pkl") and name not in (version, ".data/serialization_id"):
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    shutil.rmtree(os.path.dirname(draft))


def cast_trace(
    path: str,
    precision: str,
    memory_format: str,
    output_dtypes: Sequence[str] = ("float32",),
    input_dtypes: Sequence[str] = ("float32",),
    pictures: Sequence[bool] = (True,),
) -> torch.jit.ScriptModule:
    """Return a frozen trace in another precision and memory format. Its inputs and outputs keep their dtypes.

    Every fp32 tensor of the graph, and every operator with an fp32 dtype as argument, gets the precision. Filters get
    the memory format, and so does an fp32 picture (batch, channels, height, width). Inputs of other types stay: the
    graph casts bytes itself, and (batch, height, width, channels) is already channels last.

    Save the result, and load the file to run it: PyTorch may have cached the old graph.

    Args:
        path: The file of the trace.
        precision: "fp32", "fp16" or "bf16".
        memory_format: "contiguous" or "channels_last".
        output_dtypes: The dtypes of the outputs, by NumPy's names.
        input_dtypes: The dtypes of the inputs, by NumPy's names.
        pictures: For each input whether it is a picture (batch, channels, height, width).
    """
    dtype, layout = DTYPES[precision], MEMORY_FORMATS[memory_format]
    module: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu")
    module.to(dtype)  # freezing leaves the buffers that forward writes to
    graph = module.graph
    torch._C._jit_pass_inline(graph)
    _cast_constants(graph, dtype, layout)
    _cast_dtype_arguments(graph, DTYPE_NUMBERS[dtype])
    if memory_format == "channels_last":
        _replace_views(graph)
    _, *batches = graph.inputs()  # the first is the module itself
    first = next(iter(graph.nodes()))
    for batch, input_dtype, is_picture in zip(batches, input_dtypes, pictures, strict=True):
        if input_dtype != "float32":
            continue
        users = [use.user for use in batch.uses()]
        graph.setInsertPoint(first)
        cast_input = insert(graph, "aten::to", [batch, DTYPE_NUMBERS[dtype], False, False, None])
        if memory_format == "channels_last" and is_picture:
            cast_input = insert(graph, "aten::contiguous", [cast_input, CHANNELS_LAST_NUMBER])
        for user in users:
            user.replaceInputWith(batch, cast_input)
    fp32 = DTYPE_NUMBERS[torch.float32]
    for (node, index), output_dtype in zip(_output_slots(graph), output_dtypes, strict=True):
        source_node, source_index = _before_ranking(node, index)
        value = source_node.inputsAt(source_index)
        is_fp32 = value.node().kind() == "aten::to" and value.node().inputsAt(1).toIValue() == fp32
        if (output_dtype == "float32" or source_node is not node) and not is_fp32:
            graph.setInsertPoint(source_node)
            source_node.replaceInput(source_index, insert(graph, "aten::to", [value, fp32, False, False, None]))
    graph.lint()
    return module


def insert(graph: Any, operator: str, arguments: Sequence[Any]) -> Any:
    """Insert an operator at the graph's insert point, and return its result.

    Args:
        arguments: Values of the graph, and numbers, lists and tensors that become constants of the graph.
    """
    values = [each if isinstance(each, torch._C.Value) else graph.insertConstant(each) for each in arguments]
    return graph.insertNode(graph.create(operator, values, 1)).output()


def _cast_constants(graph: Any, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Cast the fp32 constants of the graph. Filters of convolutions get the memory format."""
    for node in graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").dtype == torch.float32:
            value = node.t("value").to(dtype)
            filters = value.ndim == 4 and any(
                use.user.kind() in CONVOLUTIONS and use.offset == 1 for use in node.output().uses()
            )
            node.t_("value", value.contiguous(memory_format=layout) if filters else value)
            node.output().inferTypeFrom(node.t("value"))


def _cast_dtype_arguments(graph: Any, number: int) -> None:
    """Replace the dtype fp32 in arguments of operators, such as in `x.float()`, by the dtype with this number."""
    for node in all_nodes(graph):
        if not node.kind().startswith("aten::"):
            continue
        for index, argument in enumerate(torch._C.parse_schema(node.schema()).arguments):
            if argument.name == "dtype" and node.inputsAt(index).toIValue() == DTYPE_NUMBERS[torch.float32]:
                graph.setInsertPoint(node)
                node.replaceInput(index, graph.insertConstant(number))


def _replace_views(graph: Any) -> None:
    """Replace `view` by `reshape`, because `view` cannot join dimensions that are not adjacent in memory."""
    for node in graph.findAllNodes("aten::view"):
        if "dtype" not in node.schema():  # with a dtype, `view` reinterprets the bits
            graph.setInsertPoint(node)
            node.output().replaceAllUsesWith(insert(graph, "aten::reshape", list(node.inputs())))
            node.destroy()


def all_nodes(block: Any) -> Iterator[Any]:
    """All nodes of a graph, with the nodes in the blocks of its nodes."""
    for node in list(block.nodes()):
        yield node
        for inner in node.blocks():
            yield from all_nodes(inner)


def _output_slots(graph: Any) -> list[tuple[Any, int]]:
    """The output tensors, each as (node, index of its input): the return, or the node that makes a tuple of them."""
    (result,) = graph.outputs()
    collected = result.node().kind() in ("prim::TupleConstruct", "prim::ListConstruct")
    node = result.node() if collected else graph.return_node()
    return [(node, index) for index in range(node.inputsSize())]


def _before_ranking(node: Any, index: int) -> tuple[Any, int]:
    """The slot before softmax and top-k, if an output comes from them.

    In fp16 many probabilities equal their neighbors, so the order of the strongest classes would be arbitrary.
    """
    source = node.inputsAt(index).node()
    ranks = source.kind() == "aten::topk" or (
        source.kind() == "aten::softmax" and source.inputsAt(2).toIValue() is None
    )
    return _before_ranking(source, 0) if ranks else (node, index)


class GpuRounding(TorchDispatchMode):
    """A mode in which products of fp16 and bf16 are added up in fp32 and then rounded, as a GPU's matrix units do.

    PyTorch's own CPU kernels for these types take twenty times as long as the kernels for fp32, unless the CPU has
    instructions for them. The outputs would then depend on the CPU. Other operators run unchanged, except for those
    that PyTorch has only for GPUs in these types. They are computed in fp32 and rounded as well.

    Attributes:
        error: The message of an operator that failed. TorchScript's interpreter does not pass it on.
    """

    error: str | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ not in PRODUCT_OPERATORS:
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                if "not implemented for" not in str(error):
                    self.error = f"{function}: {error}"
                    raise
        reduced_dtypes: list[torch.dtype] = []

        def widen(value: torch.Tensor) -> torch.Tensor:
            if value.dtype not in (torch.float16, torch.bfloat16):
                return value
            reduced_dtypes.append(value.dtype)
            return value.float()

        args, kwargs = tree_map_only(torch.Tensor, widen, (args, kwargs))
        results = CPU_FUNCTIONS.get(function.overloadpacket.__name__, function)(*args, **kwargs)

        def round_back(value: torch.Tensor) -> torch.Tensor:
            return value.to(reduced_dtypes[0]) if reduced_dtypes and value.dtype == torch.float32 else value

        return tree_map_only(torch.Tensor, round_back, results)


def run_with_gpu_rounding(module: Any, *inputs: torch.Tensor) -> Any:
    """Run a cast module on the CPU with the rounding of a GPU.

    Raises:
        RuntimeError: If an operator fails.
    """
    # Not optimized: PyTorch's optimizer would also call the mode, for thousands of comparisons of constants.
    with torch.jit.optimized_execution(False), GpuRounding() as mode:
        try:
            return module(*inputs)
        except RuntimeError as error:
            raise RuntimeError(mode.error or str(error)) from error
