"""The device of the tensors that a TorchScript graph makes while it runs.

A trace records the device of each such tensor as a constant, and the trace is taken on a CPU. On a GPU these tensors
would stay on the CPU, and the first operator that joins one with the image would fail.

    frozen trace ─► follow_input ─► saved file ─► device_error: does every operator provably get tensors of one device?
                                                      └ no ─► a run on PyTorch's meta device instead of a GPU

This module imports PyTorch and torchscript_graph.py.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from build_tasks.formats.torchscript_graph import all_nodes, insert

BATCHES = (1, 3, 3)  # PyTorch optimizes a graph after its first runs

# Tensors that these operators take from the CPU, also on a GPU.
CPU_ARGUMENTS = {"lengths", "batch_sizes"}

# Operators, also in the forms that write to their first tensor (`relu_`), that create no tensor on another device than
# that of their tensors. The list need not be complete: a graph with others runs on the meta device.
# fmt: off
SAME_DEVICE = {
    "Float", "Int", "ScalarImplicit", "_convolution", "abs", "adaptive_avg_pool2d", "add", "addmm", "avg_pool2d",
    "batch_norm", "bmm", "cat", "ceil", "chunk", "clamp", "constant_pad_nd", "contiguous", "div", "dropout", "exp",
    "expand", "flatten", "floor", "floor_divide", "gelu", "group_norm", "hardsigmoid", "hardswish", "hardtanh",
    "layer_norm", "leaky_relu", "linear", "matmul", "max_pool2d", "mean", "mul", "neg", "pad", "permute", "pow",
    "relu", "relu6", "remainder", "reshape", "rsqrt", "scaled_dot_product_attention", "select", "sigmoid", "silu",
    "size", "slice", "softmax", "split", "sqrt", "squeeze", "sub", "sum", "tanh", "transpose", "unbind",
    "unsqueeze", "view",
}
# fmt: on
COLLECTIONS = {"prim::ListConstruct", "prim::ListUnpack", "prim::TupleConstruct", "prim::TupleUnpack"}

# The words of PyTorch's operators about tensors of two devices: "Expected all tensors to be on the same device".
MIXED_DEVICES = re.compile(r"(same|expected) device|two devices|CPU int64 tensor")


def follow_input(module: torch.jit.ScriptModule) -> None:
    """Make the tensors that the graph of a frozen module creates on the CPU follow the device of its first input.

    A graph that creates no tensor is left as it is. Save the module, and load the file to run it.
    """
    graph = module.graph
    _, first_input, *_ = graph.inputs()  # the first is the module itself
    first = next(iter(graph.nodes()))
    graph.setInsertPoint(first)
    device = insert(graph, "prim::device", [first_input])
    device.setType(torch._C.DeviceObjType.get())
    for node in all_nodes(graph):
        if node.kind() == "prim::Constant" and node.output().type().kind() == "DeviceObjType":
            node.output().replaceAllUsesWith(device)
        if node.kind() == "aten::cpu":  # of scripted code; in a trace it is aten::to
            node.output().replaceAllUsesWith(node.inputsAt(0))
        if not node.kind().startswith("aten::"):
            continue
        arguments = torch._C.parse_schema(node.schema()).arguments
        takes_tensors = any("Tensor" in str(argument.type) for argument in arguments)
        for index, argument in enumerate(arguments):
            value = node.inputsAt(index)
            # Without a device, an operator that takes no tensor creates one on the CPU.
            if argument.name == "device" and not takes_tensors and value.node().mustBeNone():
                node.replaceInput(index, device)
            elif argument.name in CPU_ARGUMENTS and value.node().kind() != "aten::_pack_padded_sequence":
                graph.setInsertPoint(node)
                node.replaceInput(index, insert(graph, "aten::cpu", [value]))
    if not device.uses():
        device.node().destroy()
    _keep_sizes_on_cpu(graph)
    graph.lint()


def _keep_sizes_on_cpu(graph: Any) -> None:
    """Make the numbers of calculations with the sizes of tensors stay on the CPU when the file is loaded for a GPU.

    A trace holds a size as a tensor of the CPU, and a number that it is multiplied by as a constant tensor, which goes
    to the GPU. In `size *= 2` they cannot be joined, and elsewhere the CPU would have to wait for the result.
    """
    sizes = set()
    for node in all_nodes(graph):
        if node.kind() == "prim::NumToTensor":
            sizes.add(node.output().debugName())
            continue
        tensors = [(i, value) for i, value in enumerate(node.inputs()) if value.type().kind() == "TensorType"]
        numbers = {i: constant_number(value) for i, value in tensors if value.debugName() not in sizes}
        if not node.kind().startswith("aten::") or len(numbers) == len(tensors) or None in numbers.values():
            continue
        sizes.update(output.debugName() for output in node.outputs())
        for index, number in numbers.items():
            graph.setInsertPoint(node)
            node.replaceInput(index, insert(graph, "prim::NumToTensor", [number]))


def constant_number(value: Any) -> int | float | None:
    """The Python number that a value of a graph holds as a constant tensor; None for other values.

    The tensor is read from the node: `value.toIValue()` turns some of these tensors into numbers.
    """
    node = value.node()
    if node.kind() != "prim::Constant" or not node.hasAttribute("value") or node.kindOf("value") != "t":
        return None
    constant = node.t("value")
    return constant.item() if constant.ndim == 0 and constant.dtype in (torch.int64, torch.float64) else None


def device_error(path: str, examples: Sequence[Sequence[torch.Tensor]]) -> str | None:
    """Return PyTorch's message if a TorchScript file would join tensors of a CPU and a GPU, and None if it would not.

    Args:
        path: The file.
        examples: The inputs at each of the lengths to run. Their batch is replaced by those of BATCHES.
    """
    module = torch.jit.load(path, map_location="cpu")
    return None if joins_one_device(module.graph) else error_on_meta(module, examples)


def joins_one_device(graph: Any) -> bool:
    """Return whether each operator of a graph provably gets tensors of a single device, wherever the input is.

    The input and the constants with dimensions are on one device, sizes are on the CPU, and the result of each operator
    of SAME_DEVICE is where its tensors are. If no operator gets tensors of both, none can refuse them. What creates or
    moves a tensor in another way, and what is not in the graph itself, is not proven.
    """
    devices = {value.debugName(): "input" for value in graph.inputs()}
    for node in graph.nodes():
        kind = node.kind()
        found = {devices[value.debugName()] for value in node.inputs() if value.debugName() in devices}
        if kind == "prim::NumToTensor":
            found = {"cpu"}
        elif kind == "prim::Constant":
            if node.hasAttribute("value") and node.kindOf("value") == "t" and node.t("value").ndim:
                found = {"input"}
        elif kind not in COLLECTIONS and kind.removeprefix("aten::").removesuffix("_") not in SAME_DEVICE:
            return False
        tensors = [value.debugName() for value in node.outputs() if "Tensor" in value.type().annotation_str]
        if len(found) > 1 or (tensors and not found):
            return False
        devices.update((name, device) for name in tensors for device in found)
    return True


def error_on_meta(module: torch.jit.ScriptModule, examples: Sequence[Sequence[torch.Tensor]]) -> str | None:
    """Run a TorchScript module on the meta device, which needs no GPU, and return what `device_error` returns.

    Tensors there have a shape and no values, and operators refuse to mix them with tensors of a CPU. What needs values
    cannot run there, such as the indices of a boolean mask. Then nothing is found in the rest of the graph.

    Args:
        module: The module as it was loaded on the CPU. It is changed.
    """
    module.to("meta")
    for node in all_nodes(module.graph):
        if node.kind() == "prim::Constant" and node.hasAttribute("value") and node.kindOf("value") == "t":
            constant = node.t("value")
            if constant.ndim:  # PyTorch reads the values of others, and every device may use them
                node.t_("value", constant.to("meta"))
                node.output().inferTypeFrom(node.t("value"))
    library = torch.library.Library("aten", "IMPL", "Meta")
    # PyTorch's optimizer looks for equal constants. That operator needs values, so that the meta device lacks it.
    library.impl("equal", lambda first, second: False)
    try:
        for inputs in examples:
            for batch in BATCHES:
                module(*(torch.empty(batch, *each.shape[1:], dtype=each.dtype, device="meta") for each in inputs))
    except (RuntimeError, NotImplementedError) as error:
        lines = [line.strip() for line in str(error).splitlines() if MIXED_DEVICES.search(line)]
        return lines[-1].removeprefix("RuntimeError: ").replace("meta", "gpu").rstrip("!.") + "." if lines else None
    finally:
        library._destroy()
    return None
