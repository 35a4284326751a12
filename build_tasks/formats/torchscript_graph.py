"""TorchScript as plain files of PyTorch's: saved without traces of this machine, cast, and run as a GPU would round.

Of this project it needs nothing, and of others PyTorch alone.
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

# How TorchScript writes them: numbers. Source: c10/core/ScalarType.h and MemoryFormat.h.
NUMBERS = {torch.float16: 5, torch.float32: 6, torch.bfloat16: 15}
CHANNELS_LAST = 2

# Operators that add up products. Which of them are called depends on how they are asked for.
PRODUCTS = {
    *("conv1d", "conv2d", "conv3d", "convolution", "_convolution"),
    *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"),
}

VERSION_RECORDS = {"version", ".data/version"}  # the second for what older PyTorch cannot read; attention, say


def save_torchscript(module: torch.jit.ScriptModule, path: str) -> None:
    """torch.jit.save without the debug records, which hold stack traces with this machine's paths."""
    draft = f"{path}.draft/{path.rpartition('/')[2]}"  # the archive's records carry the file's stem
    os.makedirs(os.path.dirname(draft))
    torch.jit.save(module, draft)
    reader = torch._C.PyTorchFileReader(draft)
    writer = torch._C.PyTorchFileWriter(path)
    # The version says which meaning the operators have (an integer division, say): it must survive.
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
    answers: Sequence[str] = ("float32",),
    input_format: str = "fp32_nchw",
) -> torch.jit.ScriptModule:
    """A frozen trace in another precision and memory format, between inputs and outputs as they were.

    Every fp32 tensor of the graph, and every operator that asks for fp32, gets the precision; filters get the memory
    format, and so does an input in fp32 (batch, channels, height, width). Bytes need neither: the graph casts them
    itself, and (batch, height, width, channels) is channels last as it lies.

    path: of the trace. answers: the dtypes of its outputs, as NumPy names them. format: of its input, as the spec
    names it. What is returned is to be saved, and not to be run: PyTorch may remember the graph as it was.
    """
    dtype, layout = DTYPES[precision], MEMORY_FORMATS[memory_format]
    module: torch.jit.ScriptModule = torch.jit.load(path, map_location="cpu")
    module.to(dtype)  # what freezing left: buffers that forward writes to
    graph = module.graph
    torch._C._jit_pass_inline(graph)
    _cast_constants(graph, dtype, layout)
    _cast_dtypes(graph, NUMBERS[dtype])
    if memory_format == "channels_last":
        _reshape(graph)
    if input_format == "fp32_nchw":
        _, batch = graph.inputs()  # the first is the module itself
        users = [use.user for use in batch.uses()]
        graph.setInsertPoint(next(iter(graph.nodes())))
        border = _inserted(graph, "aten::to", batch, NUMBERS[dtype], False, False, None)
        if memory_format == "channels_last":
            border = _inserted(graph, "aten::contiguous", border, CHANNELS_LAST)
        for user in users:
            user.replaceInputWith(batch, border)
    for (taker, index), answer in zip(_outputs(graph), answers, strict=True):
        head, graph_input = _head(taker, index)
        value = head.inputsAt(graph_input)
        exact = value.node().kind() == "aten::to" and value.node().inputsAt(1).toIValue() == NUMBERS[torch.float32]
        if (answer == "float32" or head is not taker) and not exact:
            graph.setInsertPoint(head)
            head.replaceInput(
                graph_input, _inserted(graph, "aten::to", value, NUMBERS[torch.float32], False, False, None)
            )
    graph.lint()
    return module


def _inserted(graph: Any, operator: str, value: Any, *constants: int | bool | None) -> Any:
    """The result of an operator on a tensor and constants, where the graph inserts."""
    node = graph.create(operator, [value, *map(graph.insertConstant, constants)], 1)
    return graph.insertNode(node).output()


def _cast_constants(graph: Any, dtype: torch.dtype, layout: torch.memory_format) -> None:
    for node in graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").dtype == torch.float32:
            value = node.t("value").to(dtype)
            filters = value.ndim == 4 and any(
                use.user.kind() in CONVOLUTIONS and use.offset == 1 for use in node.output().uses()
            )
            node.t_("value", value.contiguous(memory_format=layout) if filters else value)
            node.output().inferTypeFrom(node.t("value"))


def _cast_dtypes(graph: Any, number: int) -> None:
    """Operators that ask for fp32, `x.float()` say, ask for the other precision."""
    for node in _nodes(graph):
        if not node.kind().startswith("aten::"):
            continue
        for index, argument in enumerate(torch._C.parse_schema(node.schema()).arguments):
            if argument.name == "dtype" and node.inputsAt(index).toIValue() == NUMBERS[torch.float32]:
                graph.setInsertPoint(node)
                node.replaceInput(index, graph.insertConstant(number))


def _reshape(graph: Any) -> None:
    """reshape in the place of view, which refuses to join dimensions that do not lie one behind the other."""
    for node in graph.findAllNodes("aten::view"):
        if "dtype" not in node.schema():  # not what takes the bits for another type
            graph.setInsertPoint(node)
            shaped = graph.insertNode(graph.create("aten::reshape", list(node.inputs()), 1))
            node.output().replaceAllUsesWith(shaped.output())
            node.destroy()


def _nodes(block: Any) -> Iterator[Any]:
    for node in list(block.nodes()):
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _outputs(graph: Any) -> list[tuple[Any, int]]:
    """The output tensors, each as an input of the node that takes it: the return, or what makes a tuple of them."""
    (answer,) = graph.outputs()
    collected = answer.node().kind() in ("prim::TupleConstruct", "prim::ListConstruct")
    taker = answer.node() if collected else graph.return_node()
    return [(taker, index) for index in range(taker.inputsSize())]


def _head(taker: Any, index: int) -> tuple[Any, int]:
    """The same of what probabilities and the best classes are made from, where an output is those.

    In fp16 many a probability equals its neighbours, and which of them are the best would be chance.
    """
    node = taker.inputsAt(index).node()
    ranks = node.kind() == "aten::topk" or (node.kind() == "aten::softmax" and node.inputsAt(2).toIValue() is None)
    return _head(node, 0) if ranks else (taker, index)


class Rounding(TorchDispatchMode):
    """Within it, products of fp16 and bf16 are added up in fp32 and rounded, as a GPU's matrix units do.

    PyTorch's own kernels for CPUs take twenty times as long as those of fp32, unless the CPU has instructions for
    them; and then the answers would depend on the CPU. Other operators run as they are, but for those that PyTorch has
    only for GPUs in these types: they, too, compute in fp32 and are rounded.

    refused: what an operator said that failed, which TorchScript's interpreter does not hand on.
    """

    refused: str | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ not in PRODUCTS:
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                if "not implemented for" not in str(error):
                    self.refused = f"{function}: {error}"
                    raise
        short: list[torch.dtype] = []

        def widened(value: torch.Tensor) -> torch.Tensor:
            if value.dtype not in (torch.float16, torch.bfloat16):
                return value
            short.append(value.dtype)
            return value.float()

        args, kwargs = tree_map_only(torch.Tensor, widened, (args, kwargs))
        answers = function(*args, **kwargs)

        def rounded(value: torch.Tensor) -> torch.Tensor:
            return value.to(short[0]) if short and value.dtype == torch.float32 else value

        return tree_map_only(torch.Tensor, rounded, answers)


def run_with_gpu_rounding(module: Any, batch: torch.Tensor) -> Any:
    """What a cast module answers on the CPU, rounded as on a GPU. RuntimeError for what an operator refuses."""
    # Unoptimised: PyTorch's optimiser would ask the mode, too, and compare constants by the thousand.
    with torch.jit.optimized_execution(False), Rounding() as mode:
        try:
            return module(batch)
        except RuntimeError as error:
            raise RuntimeError(mode.refused or str(error)) from error
