"""What single nodes cost in a precision: graphs in which only some of them are, and the nodes in order of their effect.

Emulated in ONNX Runtime on a few samples, and so faster than a conversion; repair.py begins with it.
"""

import heapq
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

MAX_EVALUATIONS = 96  # effects that are measured, at most


def emulate_nodes(source: "onnx.ModelProto", to: str) -> "Callable[[set[str]], onnx.ModelProto]":
    """The function from some nodes to the graph in which only those take and give numbers of fp16 or bf16."""
    import onnx
    from onnx import TensorProto, helper

    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[to]
    typed = onnx.shape_inference.infer_shapes(source).graph
    known = (*typed.value_info, *typed.input, *typed.output)
    floats = {value.name for value in known if value.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {tensor.name for tensor in source.graph.initializer if tensor.data_type == TensorProto.FLOAT}

    def casts(old: str, new: str) -> "list[onnx.NodeProto]":
        return [
            helper.make_node("Cast", [old], [f"{new}.low"], to=kind),
            helper.make_node("Cast", [f"{new}.low"], [new], to=TensorProto.FLOAT),
        ]

    def rounded(nodes: set[str]) -> "onnx.ModelProto":
        graph = onnx.ModelProto()
        graph.CopyFrom(source)
        del graph.graph.node[:]
        there: set[str] = set()
        for original in source.graph.node:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            after = []
            if node.name in nodes:
                for index, name in enumerate(node.input):
                    if name in floats:
                        node.input[index] = f"{name}.in"
                        if name not in there:
                            there.add(name)
                            graph.graph.node.extend(casts(name, f"{name}.in"))
                for index, name in enumerate(node.output):
                    if name in floats:
                        node.output[index] = f"{name}.exact"
                        after += casts(f"{name}.exact", name)
            graph.graph.node.extend([node, *after])
        return graph

    return rounded


def keep_qdq_for(whole: "onnx.ModelProto", nodes: set[str]) -> "onnx.ModelProto":
    """A quantised graph with the Q/DQ pairs before some nodes only."""
    import onnx

    pairs = {"QuantizeLinear", "DequantizeLinear"}
    made_by = {name: node for node in whole.graph.node if node.op_type in pairs for name in node.output}

    def exact(name: str) -> str:
        while name in made_by:
            name = made_by[name].input[0]
        return name

    graph = onnx.ModelProto()
    graph.CopyFrom(whole)
    for node in graph.graph.node:
        if node.op_type not in pairs and node.name not in nodes:
            for index, name in enumerate(node.input):
                node.input[index] = exact(name)
    used, needed = {output.name for output in graph.graph.output}, []
    for node in reversed(graph.graph.node):
        if node.op_type not in pairs or not used.isdisjoint(node.output):
            needed.append(node)
            used |= {*node.input}
    kept = [node.SerializeToString() for node in reversed(needed)]
    del graph.graph.node[:]
    graph.graph.node.extend(onnx.NodeProto.FromString(node) for node in kept)
    return graph


def rank_nodes(
    effect: Callable[[Iterable[str]], float], nodes: list[str], limit: float, tell: Callable[[str], None]
) -> list[str]:
    """The nodes, those first that move the outputs most.

    The nodes are halved where the effect is largest, again and again, until PROBES effects are known, or the parts that
    are left with several nodes move the outputs together by a quarter of the limit, or of what all nodes do, at most.
    The nodes of such a part share its effect. tell: hears of the progress.
    """
    place = {name: index for index, name in enumerate(nodes)}
    weighed: list[tuple[float, int, str]] = []
    parts: list[tuple[float, int, list[str]]] = []  # the negative effect, for the largest first

    def weigh(part: list[str]) -> None:
        size = effect(part)
        if len(part) == 1:
            weighed.append((-size, place[part[0]], part[0]))
        else:
            heapq.heappush(parts, (-size, place[part[0]], part))

    weigh(nodes)
    enough = min(limit, -parts[0][0] if parts else 0.0) / 4
    probes = 1
    while parts and probes + 2 <= MAX_EVALUATIONS and math.hypot(*(size for size, _, _ in parts)) > enough:
        _, _, part = heapq.heappop(parts)
        middle = len(part) // 2
        weigh(part[:middle])
        weigh(part[middle:])
        probes += 2
        if probes % 8 == 1 and parts:
            largest = -parts[0][0]
            tell(f"effects measured: {probes} of at most {MAX_EVALUATIONS}, the largest of several nodes {largest:.1e}")
    weighed += [(size / math.sqrt(len(part)), place[name], name) for size, _, part in parts for name in part]
    return [name for _, _, name in sorted(weighed)]
