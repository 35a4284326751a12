"""Rewrites of a cast TorchScript graph that make it faster on an NVIDIA GPU, with the same outputs up to rounding.

    convolution, ReLU                  ─► cudnn_convolution_relu       one kernel
    convolution, addition, ReLU        ─► cudnn_convolution_add_relu   one kernel
    gate of squeeze-and-excite, 1 x 1  ─► a batched product whose filters are multiplied by the gate
    other 1 x 1 convolutions           ─► linear over channels last: the product's kernel adds the bias

To add a bias in an operator of its own, which PyTorch's fuser joins with the activation, is no rewrite here: it halved
the speed of efficientnet_b3 at batches that are not among the first two that the fuser sees (docs/performance.md).

A rewrite that does not fit leaves the graph alone. The first two operators have no kernel for a CPU:
torchscript_graph.GpuRounding computes them there.

This module imports PyTorch and torchscript_graph.py.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from build_tasks.formats.torchscript_graph import CONVOLUTIONS, all_nodes, insert

CONVOLUTION_RELU, CONVOLUTION_ADD_RELU = "aten::cudnn_convolution_relu", "aten::cudnn_convolution_add_relu"
GPU_OPERATORS = {CONVOLUTION_RELU, CONVOLUTION_ADD_RELU}
GATES = {"aten::sigmoid", "aten::hardsigmoid"}
NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


class Convolution(NamedTuple):
    """A convolution of images whose filters are constant."""

    node: Any
    image: Any
    filters: torch.Tensor  # (output channels, input channels / groups, height, width)
    bias: torch.Tensor | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    @property
    def output(self) -> Any:
        return self.node.output()

    @property
    def is_product(self) -> bool:
        """Whether each pixel is multiplied by one matrix."""
        strides = {*self.stride}
        return self.filters.shape[2:] == (1, 1) and self.groups == 1 and strides == {1} and {*self.padding} == {0}


def rewrite_for_gpu(module: torch.jit.ScriptModule, examples: Sequence[torch.Tensor]) -> dict[str, int]:
    """Apply all rewrites to the graph of a cast module with channels last.

    Save the module, and load the file to run it: the graph in the file holds no shapes.

    Args:
        module: What torchscript_graph.cast_trace returned.
        examples: A tensor for each input. Only shapes and dtypes count: some rewrites are worth it for large images.
    Returns: How often each rewrite was applied.
    """
    graph = module.graph
    torch._C._jit_pass_remove_mutation(graph)  # `relu_` becomes `relu` where no other operator sees the difference
    _, *inputs = graph.inputs()  # the first is the module itself
    for value, example in zip(inputs, examples, strict=True):
        value.inferTypeFrom(example)
    torch._C._jit_pass_propagate_shapes_on_graph(graph)
    counts = {}
    for name, rewrite in REWRITES.items():
        counts[name] = rewrite(graph)
        torch._C._jit_pass_dce(graph)
    graph.lint()
    return counts


def needs_gpu(module: torch.jit.ScriptModule) -> bool:
    """Whether a module has an operator that PyTorch has for GPUs only."""
    return any(node.kind() in GPU_OPERATORS for node in all_nodes(module.graph))


def fuse_relu(graph: Any) -> int:
    """Join convolutions with the addition and the ReLU that follow them."""
    count = 0
    for convolution in convolutions(graph):
        add, last = None, only_user(convolution.output)
        if last is not None and last.kind() == "aten::add":
            add, last = last, only_user(last.output())
        if convolution.groups > 1 or last is None or last.kind() != "aten::relu":
            continue
        operator, operands = CONVOLUTION_RELU, []
        if add is not None:
            first, second, factor = add.inputs()
            other = second if first.debugName() == convolution.output.debugName() else first
            if sizes(other) is None or sizes(other) != sizes(convolution.output) or factor.toIValue() != 1:
                continue
            operator, operands = CONVOLUTION_ADD_RELU, [other, 1]
        filters, *options = convolution[2:]
        replace(graph, last, operator, [convolution.image, filters, *operands, *options])
        count += 1
    return count


def scale_filters(graph: Any) -> int:
    """Multiply the filters of a 1 x 1 convolution by the gate of squeeze-and-excite, in place of the larger image.

    Each image has a gate of its own, so that the convolution becomes a product for each image. It is left alone if the
    filters are larger than half of the image.
    """
    count = 0
    for convolution in convolutions(graph):
        multiply = convolution.image.node()
        if not convolution.is_product or multiply.kind() != "aten::mul" or only_user(convolution.image) is None:
            continue
        image, gate = multiply.inputs()
        if gate.node().kind() not in GATES:
            image, gate = gate, image
        outputs, channels = convolution.filters.shape[:2]
        dims, gate_dims = sizes(image), sizes(gate)
        if gate.node().kind() not in GATES or dims is None or gate_dims != [dims[0], channels, 1, 1]:
            continue
        if dims[1] != channels or dims[2] * dims[3] < 2 * outputs:
            continue
        graph.setInsertPoint(convolution.node)
        image_size = insert_image_size(graph, image)
        rows = insert(graph, "aten::flatten", [insert(graph, "aten::permute", [image, NHWC]), 1, 2])
        filters = convolution.filters.flatten(1).t().contiguous()
        scaled = insert(graph, "aten::mul", [insert(graph, "aten::flatten", [gate, 2, 3]), filters])
        if convolution.bias is None:
            product = insert(graph, "aten::bmm", [rows, scaled])
        else:
            product = insert(graph, "aten::baddbmm", [convolution.bias, rows, scaled, 1, 1])
        split = insert(graph, "aten::unflatten", [product, 1, image_size])
        replace(graph, convolution.node, "aten::permute", [split, NCHW])
        count += 1
    return count


def replace_by_products(graph: Any) -> int:
    """Replace 1 x 1 convolutions by products over channels last."""
    count = 0
    for convolution in convolutions(graph):
        dims = sizes(convolution.image)
        if not convolution.is_product or dims is None or dims[2:] == [1, 1]:
            continue
        graph.setInsertPoint(convolution.node)
        matrix = convolution.filters.flatten(1).contiguous()
        rows = insert(graph, "aten::permute", [convolution.image, NHWC])
        product = insert(graph, "aten::linear", [rows, matrix, convolution.bias])
        replace(graph, convolution.node, "aten::permute", [product, NCHW])
        count += 1
    return count


def convolutions(graph: Any) -> Iterator[Convolution]:
    """The convolutions of images whose filters and bias are constant."""
    for node in all_nodes(graph):
        if node.kind() not in CONVOLUTIONS:
            continue
        names = [argument.name for argument in torch._C.parse_schema(node.schema()).arguments]
        arguments = dict(zip(names, node.inputs(), strict=True))
        filters, bias = constant(arguments["weight"]), constant(arguments["bias"])
        lists = [constant(arguments[name]) for name in ("stride", "padding", "dilation")]
        transposed = "transposed" in arguments and constant(arguments["transposed"])
        if isinstance(filters, torch.Tensor) and filters.ndim == 4 and not transposed and isinstance(lists[1], list):
            stride, padding, dilation = lists
            groups = constant(arguments["groups"])
            yield Convolution(node, arguments["input"], filters, bias, stride, padding, dilation, groups)


def constant(value: Any) -> Any:
    """The constant that a value of a graph stands for, also a list of constants; None for other values."""
    node = value.node()
    if node.kind() == "prim::ListConstruct":
        return [constant(item) for item in node.inputs()]
    if node.kind() == "prim::Constant" and node.hasAttribute("value") and node.kindOf("value") == "t":
        return node.t("value")
    return value.toIValue()


def sizes(value: Any) -> list[int] | None:
    """The shape of a tensor with four dimensions, None if it is unknown."""
    dims = value.type().symbolic_sizes() if value.type().kind() == "TensorType" else None
    return dims if dims is not None and len(dims) == 4 and all(size > 0 for size in dims) else None


def only_user(value: Any) -> Any:
    """The node that uses a value, None if there are several."""
    uses = list(value.uses())
    return uses[0].user if len(uses) == 1 else None


def replace(graph: Any, node: Any, operator: str, arguments: Sequence[Any]) -> None:
    """Insert an operator at a node whose output it replaces."""
    graph.setInsertPoint(node)
    output = insert(graph, operator, arguments)
    output.setType(node.output().type())
    node.output().replaceAllUsesWith(output)


def insert_image_size(graph: Any, image: Any) -> Any:
    """Insert the list [height, width] of an image at the graph's insert point, and return it."""
    numbers = [insert(graph, "aten::size", [image, axis]) for axis in (2, 3)]
    for number in numbers:
        number.setType(torch._C.IntType.get())
    size = insert(graph, "prim::ListConstruct", numbers)
    size.setType(torch._C.ListType(torch._C.IntType.get()))
    return size


REWRITES = {  # in this order: the first takes the convolutions after a gate, and the third what the second has left
    "gates in filters": scale_filters,
    "ReLU in convolutions": fuse_relu,
    "products": replace_by_products,
}
