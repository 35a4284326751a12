"""How far an artifact is from what it stands for, and how an artifact is run."""

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import onnx

# The PyTorch backend's convention, kept in every format, so that a client changes nothing but the model's name.
# Source: the server's docs, user_guide/model_configuration.md, "Inputs and Outputs".
INPUT, OUTPUT = "INPUT__0", "OUTPUT__{}"


LARGEST_MESSAGE = 2_000_000_000  # bytes; protobuf ends at 2 GiB


# What a precision may cost: its unit roundoff, and the bounds of the relative L2 error that it is allowed.
#
# Rounding moves a network's outputs about as far as the network amplifies any small difference. Over 38 of timm's
# architectures (random weights, batch statistics of the photographs; real ones for efficientnet_lite0) the error of
# graphs in ONNX Runtime was 0.9 to 2.0 (fp32), 0.1 to 1.1 (fp16) and 0.1 to 1.4 (bf16) times SENSITIVITY x roundoff
# over fp32's, where SENSITIVITY is the relative change of the fp32 outputs when every input value moves by an ulp; of
# PyTorch itself on an H100, over 29 of them, 0.9 to 2.3, 0.2 to 1.3 and 0.1 to 1.2. The one exception (13) has weights
# that fp16 cannot tell from zero. Hence a limit of 4 times that: above rounding, below whatever else goes wrong. The
# lower bound is for networks that average the inputs' differences away, the upper one for those that amplify so much
# that they should not be trusted in this precision.
# int8 and fp8 do not round, they coarsen: they are judged by the classes, and by this only in the gross.
ROUNDOFF = {"fp32": 2**-24, "tf32": 2**-11, "fp16": 2**-11, "bf16": 2**-8}
BOUNDS = {"fp32": (1e-4, 1e-2), "tf32": (1e-2, 0.1), "fp16": (1e-2, 0.1), "bf16": (5e-2, 0.3)}
COARSE = 0.5
MARGIN = 4


def tolerance(precision: str, sensitivity: float) -> float:
    """The relative L2 error that an output may have in a precision, by its sensitivity to an ulp of the inputs."""
    if precision not in ROUNDOFF:
        return COARSE
    least, most = BOUNDS[precision]
    return min(max(MARGIN * sensitivity * ROUNDOFF[precision] / ROUNDOFF["fp32"], least), most)


def moved_by_an_ulp(batch: "np.ndarray", seed: int = 0) -> "np.ndarray":
    """Every value of a float32 array, moved to one of its two neighbours; which one is drawn under a seed."""
    import numpy as np

    up = np.random.default_rng(seed).random(batch.shape, dtype=np.float32) < 0.5
    moved: np.ndarray = np.nextafter(batch, np.where(up, np.float32(np.inf), np.float32(-np.inf)))
    return moved


def relative_error(found: "np.ndarray", expected: "np.ndarray") -> float:
    """The L2 norm of the difference over the norm of what is expected; inf where shape, dtype or a NaN forbids it."""
    import numpy as np

    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    if not (np.isfinite(found).all() and np.isfinite(expected).all()):
        return float("inf")
    difference = np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(np.linalg.norm(expected.astype(np.float64)), np.finfo(np.float64).tiny))


def disagreement(found: "list[np.ndarray]", expected: "list[np.ndarray]") -> float:
    """The largest relative error of any output; inf where their number differs."""
    if len(found) != len(expected):
        return float("inf")
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def arranged(shape: Sequence[int], format: str) -> list[int]:
    """(channels, height, width) in the order of input.format."""
    channels, *size = shape
    return [*size, channels] if format == "uint8_nhwc" else [channels, *size]


def continuous(outputs: "list[np.ndarray]") -> "list[np.ndarray]":
    """The outputs without the classes of output.top_k, of which two that are as good as equal may change places."""
    return [output for output in outputs if output.dtype.kind == "f"] or outputs


def onnx_file(path: str) -> str:
    """The file of an ONNX artifact, which is a folder where the weights are external data."""
    return f"{path}/{os.path.basename(path)}" if os.path.isdir(path) else path


def onnx_session(path: str, cores: int = 1) -> "Callable[[np.ndarray], list[np.ndarray]]":
    """An ONNX artifact in ONNX Runtime on the CPU, as a function from a batch to its outputs.

    cores: more than one where no answer is recorded; see threads.py.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores
    session = onnxruntime.InferenceSession(onnx_file(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {INPUT: batch})


def fixed_batch(path: str) -> int | None:
    """The batch of an ONNX artifact, None where it is open."""
    import onnx

    (image,) = onnx.load(onnx_file(path), load_external_data=False).graph.input
    return image.type.tensor_type.shape.dim[0].dim_value or None


def reduced_session(path: str) -> "Callable[[np.ndarray], list[np.ndarray]]":
    """A graph of reduced precision in ONNX Runtime on the CPU, with the rounding that it asks for."""
    import onnx

    return unoptimised(emulated(onnx.load(onnx_file(path))))


def emulated(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """The graph, or one that ONNX Runtime can run on a CPU with the same rounding."""
    return rounded(graph) if computes_bf16(graph) else graph


def unoptimised(graph: "onnx.ModelProto") -> "Callable[[np.ndarray], list[np.ndarray]]":
    """A graph in ONNX Runtime on the CPU as it stands, as a function from a batch to its outputs.

    ONNX Runtime's optimisations are off. On a CPU they take casts to fp16 and back for nothing, and of 1.32 they
    fold Q/DQ pairs with fp16 scales wrongly (relative error 2.0 for one of 0.36).
    """
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        if graph.ByteSize() > LARGEST_MESSAGE:
            source: bytes | str = f"{folder}/model.onnx"
            onnx.save(graph, f"{folder}/model.onnx", save_as_external_data=True, location="model.onnx.data")
        else:
            source = graph.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    (wanted,) = (np_type(tensor) for tensor in graph.graph.input)
    return lambda batch: session.run(None, {INPUT: batch.astype(wanted)})


def np_type(tensor: "onnx.ValueInfoProto") -> "np.dtype[np.generic]":
    """NumPy's type of an input or output of a graph."""
    import onnx

    return onnx.helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type)


def computes_bf16(graph: "onnx.ModelProto") -> bool:
    import onnx

    return any(tensor.data_type == onnx.TensorProto.BFLOAT16 for tensor in graph.graph.initializer)


def rounded(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph with its bf16 arithmetic done in fp32, and every result rounded to bf16.

    ONNX Runtime has no bf16 kernels for CPUs. A GPU's matrix units, too, multiply bf16 and add up in fp32.
    """
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    bf16 = TensorProto.BFLOAT16

    def widened(tensor: TensorProto) -> TensorProto:
        if tensor.data_type != bf16:
            return tensor
        return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)

    typed = onnx.shape_inference.infer_shapes(graph).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*typed.value_info, *typed.output, *typed.input)}
    nodes = []
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR:
                attribute.t.CopyFrom(widened(attribute.t))
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == bf16:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for index, name in enumerate(node.output):
            if types.get(name) == bf16:
                node.output[index] = f"{name}.exact"
                nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.bf16"], to=bf16))
                nodes.append(helper.make_node("Cast", [f"{name}.bf16"], [name], to=TensorProto.FLOAT))
    initializers = [widened(tensor) for tensor in graph.graph.initializer]
    del graph.graph.node[:], graph.graph.initializer[:], graph.graph.value_info[:]
    graph.graph.node.extend(nodes)
    graph.graph.initializer.extend(initializers)
    return graph
