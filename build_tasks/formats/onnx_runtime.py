"""ONNX graphs in ONNX Runtime on the CPU, with the rounding of precisions that it has no CPU kernels for."""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from build_tasks.errors import UserError
from build_tasks.formats import ragged_batches
from build_tasks.formats.onnx_files import MAX_MESSAGE_BYTES, numpy_dtype, onnx_file, save_onnx
from build_tasks.verification.tolerance import perturb_one_ulp

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from build_tasks.tensors import Feed

# What ONNX Runtime says besides the reason: a code, the file, which may be a draft, and a function of its C++ source.
CODE = r"\[ONNXRuntimeError\] : \d+ : \w+ : "
FILE = r"Load model from .*? failed: ?"
PLACE = r"\S+\.(?:cc|h):\d+ (?:(?:\S+ )?[\w:~]+\([^()]*(?:\([^()]*\)[^()]*)*\)(?: const)?|\w+) "
NODE = r"Non-zero status code returned while running (\w+) node\. Name:'(.*?)' Status Message: "


class OnnxRuntimeError(Exception):
    """The reason in an error of ONNX Runtime, whose own errors have no common class."""


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn an error of ONNX Runtime into OnnxRuntimeError: "Conv /stem/conv: Input channels C is not equal to …".

    Raises:
        OnnxRuntimeError: In the place of any error but a UserError.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a dozen classes
        text = re.sub(f"{CODE}|{FILE}|{PLACE}", "", str(error))
        raise OnnxRuntimeError(re.sub(NODE, lambda node: f"{' '.join(filter(None, node.groups()))}: ", text)) from error


def onnx_session(path: str, cores: int = 1) -> "Callable[[Feed], list[np.ndarray]]":
    """Load an ONNX artifact and return the function from a batch of its inputs to its outputs.

    Args:
        path: The artifact.
        cores: The number of threads. It must be 1 if outputs are recorded (see runtime/threads.py).
    Raises:
        OnnxRuntimeError: If ONNX Runtime cannot load it. The function raises it if ONNX Runtime cannot run the batch.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    with plain_errors():
        session = onnxruntime.InferenceSession(onnx_file(path), options, providers=["CPUExecutionProvider"])
    return plain_errors()(ragged_batches.run_of(session))


def perturbed_session(path: str, seed: int) -> "Callable[[Feed], list[np.ndarray]]":
    """Load an ONNX artifact with every fp32 weight replaced by the next larger or smaller value, at random."""
    import onnx

    graph = onnx.load(onnx_file(path))
    for index, weight in enumerate(graph.graph.initializer):
        if weight.data_type == onnx.TensorProto.FLOAT:
            values = perturb_one_ulp(onnx.numpy_helper.to_array(weight), seed + index)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(graph, f"{folder}/model.onnx", external_data=False)
        return onnx_session(f"{folder}/model.onnx")


def reduced_session(path: str) -> "Callable[[Feed], list[np.ndarray]]":
    """Load a graph of reduced precision and return the function from a batch to its outputs, with all its rounding."""
    import onnx

    return session_without_optimizations(emulate_on_cpu(onnx.load(onnx_file(path))))


def emulate_on_cpu(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return the graph, or an equal one with the same rounding if ONNX Runtime cannot run it on a CPU."""
    return emulate_bf16(graph) if computes_bf16(graph) else graph


def session_without_optimizations(graph: "onnx.ModelProto") -> "Callable[[Feed], list[np.ndarray]]":
    """Load a graph without ONNX Runtime's optimizations and return the function from a batch to its outputs.

    On a CPU the optimizations remove casts to fp16 and back. Those of ONNX Runtime 1.32 also fold Q/DQ pairs with fp16
    scales wrongly (relative error 2.0 instead of 0.36).
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        if graph.ByteSize() > MAX_MESSAGE_BYTES:
            source: bytes | str = f"{folder}/model.onnx"
            onnx.save(graph, f"{folder}/model.onnx", save_as_external_data=True, location="model.onnx.data")
        else:
            source = graph.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    dtypes = {tensor.name: numpy_dtype(tensor) for tensor in graph.graph.input}
    return lambda feed: session.run(None, {name: array.astype(dtypes[name]) for name, array in feed.items()})


def computes_bf16(graph: "onnx.ModelProto") -> bool:
    """Whether the graph has bf16 weights, as all bf16 graphs of this project do."""
    import onnx

    return any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in graph.graph.initializer)


def emulate_bf16(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """Return the same graph with its bf16 arithmetic done in fp32 and every result rounded to bf16.

    ONNX Runtime has no bf16 kernels for CPUs. The matrix units of a GPU also multiply bf16 and add up in fp32.
    """
    import numpy as np
    import onnx
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.logger import G_LOGGER

    bf16, fp32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    with G_LOGGER.suppress(G_LOGGER.ERROR):  # it warns that NumPy has no bf16, once for each tensor
        graph = gs.import_onnx(onnx.shape_inference.infer_shapes(model))
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant) and tensor.dtype == bf16:
                tensor.values = tensor.values.astype(np.float32)
        nodes: list[Any] = []
        for node in graph.nodes:
            for name, value in node.attrs.items():
                if isinstance(value, gs.Constant) and value.dtype == bf16:
                    value.values = value.values.astype(np.float32)
                elif (node.op, name, value) == ("Cast", "to", bf16):
                    node.attrs[name] = fp32
            nodes.append(node)
            for index, tensor in enumerate(node.outputs):
                if tensor.dtype == bf16:
                    node.outputs[index] = gs.Variable(f"{tensor.name}.exact")
                    rounded = gs.Variable(f"{tensor.name}.bf16")
                    nodes.append(gs.Node("Cast", attrs={"to": bf16}, inputs=[node.outputs[index]], outputs=[rounded]))
                    nodes.append(gs.Node("Cast", attrs={"to": fp32}, inputs=[rounded], outputs=[tensor]))
    graph.nodes = nodes
    emulated: onnx.ModelProto = gs.export_onnx(graph)
    del emulated.graph.value_info[:]  # it still says bf16
    return emulated
