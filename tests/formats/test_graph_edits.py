"""Edits of ONNX graphs: renamed tensors, an open batch, rounded nodes, Q/DQ pairs. Each is run in ONNX Runtime."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from build_tasks.errors import UserError
from build_tasks.formats import node_precision, onnx_names
from build_tasks.formats.onnx_batch_first import put_batch_first
from build_tasks.formats.onnx_runtime import emulate_bf16, session_without_optimizations

Array = np.ndarray[Any, Any]

RANDOM = np.random.default_rng(20261128)
IMAGES = RANDOM.standard_normal((3, 8)).astype(np.float32)
WEIGHTS = RANDOM.standard_normal((8, 4)).astype(np.float32)
BIAS = RANDOM.standard_normal(4).astype(np.float32)
REDUCED = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def model_of(
    nodes: list[onnx.NodeProto],
    initializers: dict[str, Array],
    names: tuple[str, str] = ("INPUT__0", "OUTPUT__0"),
    answer: tuple[int | None, ...] = (None, 4),
    opset: int = 17,
) -> onnx.ModelProto:
    """A checked graph from float32 (batch, 8) to an output of the shape `answer`."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(names[0], TensorProto.FLOAT, [None, 8])],
        [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, answer)],
        [numpy_helper.from_array(values, name) for name, values in initializers.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def two_layers() -> onnx.ModelProto:
    """(x @ WEIGHTS + BIAS), then the sine of it."""
    nodes = [
        helper.make_node("Gemm", ["INPUT__0", "weights", "bias"], ["hidden"], name="gemm"),
        helper.make_node("Sin", ["hidden"], ["OUTPUT__0"], name="sin"),
    ]
    return model_of(nodes, {"weights": WEIGHTS, "bias": BIAS})


def run(model: onnx.ModelProto, batch: Array = IMAGES) -> Array:
    (answer,) = session_without_optimizations(model)({model.graph.input[0].name: batch})
    return answer


def rounded(values: Array, precision: str) -> Array:
    reduced: Array = values.astype(REDUCED[precision]).astype(np.float32)
    return reduced


# Single nodes in a reduced precision.


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_only_the_named_nodes_round_what_they_read_and_write(precision: str) -> None:
    model = two_layers()
    before = model.SerializeToString()
    emulate = node_precision.emulate_nodes(model, precision)
    exact = IMAGES @ WEIGHTS + BIAS
    hidden = rounded(rounded(IMAGES, precision) @ rounded(WEIGHTS, precision) + rounded(BIAS, precision), precision)
    expected = {
        (): np.sin(exact),
        ("gemm",): np.sin(hidden),
        ("sin",): rounded(np.sin(rounded(exact, precision)), precision),
        ("gemm", "sin"): rounded(np.sin(hidden), precision),
    }
    for names, answer in expected.items():
        np.testing.assert_allclose(run(emulate(set(names))), answer, rtol=1e-5, atol=1e-6, err_msg=str(names))
    assert np.abs(expected["gemm",] - expected[()]).max() > 1e-4, "else the test shows nothing"
    assert model.SerializeToString() == before


def test_a_tensor_that_two_nodes_read_is_cast_once() -> None:
    nodes = [
        helper.make_node("Sin", ["INPUT__0"], ["a"], name="a"),
        helper.make_node("Cos", ["INPUT__0"], ["b"], name="b"),
        helper.make_node("Add", ["a", "b"], ["OUTPUT__0"], name="sum"),
    ]
    emulated = node_precision.emulate_nodes(model_of(nodes, {}, answer=(None, 8)), "fp16")({"a", "b"})
    assert [node.op_type for node in emulated.graph.node].count("Cast") == 6
    images = rounded(IMAGES, "fp16")
    expected = rounded(np.sin(images), "fp16") + rounded(np.cos(images), "fp16")
    np.testing.assert_allclose(run(emulated), expected, rtol=1e-5, atol=1e-6)


def test_integers_are_not_cast() -> None:
    nodes = [
        helper.make_node("Shape", ["INPUT__0"], ["shape"], name="shape"),
        helper.make_node("Reshape", ["INPUT__0", "shape"], ["OUTPUT__0"], name="reshape"),
    ]
    emulated = node_precision.emulate_nodes(model_of(nodes, {}, answer=(None, 8)), "bf16")({"shape", "reshape"})
    np.testing.assert_array_equal(run(emulated), rounded(IMAGES, "bf16"))


def quantized() -> onnx.ModelProto:
    """Two layers, each with a Q/DQ pair of its own scale before it."""
    scales = {"first": np.float32(0.5), "second": np.float32(0.25)}
    initializers: dict[str, Array] = {"weights": WEIGHTS, "zero": np.zeros((), np.int8)}
    nodes = []
    for name, source in (("first", "INPUT__0"), ("second", "hidden")):
        initializers[f"{name}_scale"] = np.array(scales[name])
        pair = [f"{name}_scale", "zero"]
        nodes += [
            helper.make_node("QuantizeLinear", [source, *pair], [f"{name}_q"], name=f"{name}_q"),
            helper.make_node("DequantizeLinear", [f"{name}_q", *pair], [f"{name}_dq"], name=f"{name}_dq"),
        ]
        if name == "first":
            nodes.append(helper.make_node("MatMul", ["first_dq", "weights"], ["hidden"], name="matmul"))
    nodes.append(helper.make_node("Sin", ["second_dq"], ["OUTPUT__0"], name="sin"))
    return model_of(nodes, initializers)


@pytest.mark.parametrize("names", [(), ("matmul",), ("sin",), ("matmul", "sin")])
def test_qdq_pairs_stay_before_the_named_nodes_only(names: tuple[str, ...]) -> None:
    def coarse(values: Array, scale: float) -> Array:
        return (np.clip(np.round(values / scale), -128, 127) * scale).astype(np.float32)

    model = quantized()
    kept = node_precision.keep_qdq_for(model, set(names))
    operators = [node.op_type for node in kept.graph.node]
    assert operators.count("QuantizeLinear") == operators.count("DequantizeLinear") == len(names)
    hidden = (coarse(IMAGES, 0.5) if "matmul" in names else IMAGES) @ WEIGHTS
    expected = np.sin(coarse(hidden, 0.25) if "sin" in names else hidden)
    np.testing.assert_allclose(run(kept), expected, rtol=1e-5, atol=1e-6)
    assert [node.op_type for node in model.graph.node].count("QuantizeLinear") == 2


def test_bf16_graphs_run_on_a_cpu_with_every_result_rounded() -> None:
    half = rounded(np.array(0.3, np.float32), "bf16").astype(ml_dtypes.bfloat16)
    constant = helper.make_node("Constant", [], ["half"], value=numpy_helper.from_array(half), name="half")
    nodes = [
        helper.make_node("Cast", ["INPUT__0"], ["low"], to=TensorProto.BFLOAT16, name="down"),
        helper.make_node("MatMul", ["low", "weights"], ["hidden"], name="matmul"),
        constant,
        helper.make_node("Mul", ["hidden", "half"], ["scaled"], name="mul"),
        helper.make_node("Cast", ["scaled"], ["OUTPUT__0"], to=TensorProto.FLOAT, name="up"),
    ]
    emulated = emulate_bf16(model_of(nodes, {"weights": WEIGHTS.astype(ml_dtypes.bfloat16)}))
    hidden = rounded(rounded(IMAGES, "bf16") @ rounded(WEIGHTS, "bf16"), "bf16")
    np.testing.assert_array_equal(run(emulated), rounded(hidden * half.astype(np.float32), "bf16"))
    assert TensorProto.BFLOAT16 not in {tensor.data_type for tensor in emulated.graph.initializer}


# The user's own files.


def branches() -> onnx.ModelProto:
    """A graph whose If node reads the input, a tensor and a weight of the graph around it in both branches."""

    def branch(name: str, operator: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node(operator, ["images", "weights"], [f"{name}_product"]),
            helper.make_node("Add", [f"{name}_product", "total"], [f"{name}_out"]),
        ]
        return helper.make_graph(
            nodes, name, [], [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [None, 8])]
        )

    nodes = [
        helper.make_node("ReduceSum", ["images"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["positive"]),
        helper.make_node(
            "If", ["positive"], ["scores"], then_branch=branch("yes", "Mul"), else_branch=branch("no", "Add")
        ),
    ]
    initializers = {"weights": np.full((1, 8), 2, np.float32), "zero": np.zeros((), np.float32)}
    return model_of(nodes, initializers, ("images", "scores"), (None, 8))


def test_tensors_are_renamed_in_branches_too() -> None:
    model = branches()
    original = onnx.ModelProto.FromString(model.SerializeToString())
    renamed = onnx_names.rename_tensors(model, ["INPUT__0"], ["OUTPUT__0"])
    onnx.checker.check_model(renamed, full_check=True)
    assert [tensor.name for tensor in (*renamed.graph.input, *renamed.graph.output)] == ["INPUT__0", "OUTPUT__0"]
    for sign in (1, -1):
        images = sign * np.abs(IMAGES)
        total = images.sum()
        expected = (images * 2 if sign > 0 else images + 2) + total
        np.testing.assert_allclose(run(renamed, images), expected, rtol=1e-4)
    assert (renamed.opset_import, renamed.ir_version) == (original.opset_import, original.ir_version)
    assert renamed.ByteSize() - original.ByteSize() < 100, "a weight of both branches is in the file once"


def test_a_rename_keeps_the_rest_of_the_file() -> None:
    """Metadata, an attribute that is an empty list, and one that is a type. onnx-graphsurgeon keeps none of them."""
    mean = helper.make_node("ReduceMean", ["images"], ["mean"], keepdims=0)
    mean.attribute.append(onnx.AttributeProto(name="axes", type=onnx.AttributeProto.INTS))
    optional = helper.make_node(
        "Optional", [], ["optional"], type=helper.make_tensor_type_proto(TensorProto.FLOAT, [8])
    )
    model = model_of([mean, optional, helper.make_node("Sin", ["mean"], ["scores"])], {}, ("images", "scores"), ())
    model.metadata_props.add(key="names", value="cat, dog")
    renamed = onnx_names.rename_tensors(model, ["INPUT__0"], ["OUTPUT__0"])
    attributes = [attribute.name for node in renamed.graph.node for attribute in node.attribute]
    assert attributes == ["keepdims", "axes", "type"]
    assert renamed.metadata_props[0].value == "cat, dog"
    np.testing.assert_allclose(run(renamed), np.sin(IMAGES.mean()), rtol=1e-5)


def test_a_batch_dimension_that_an_output_does_not_have_is_one_line() -> None:
    def sine(answer: tuple[int | None, ...] | None) -> onnx.ModelProto:
        model = model_of([helper.make_node("Sin", ["images"], ["scores"])], {}, ("images", "scores"), (None, 8))
        output = helper.make_tensor_value_info("scores", TensorProto.FLOAT, answer)
        model.graph.output[0].CopyFrom(output)
        return model

    message = r"outputs\[0\]\.batch_dimension: m\.onnx declares 2 dimensions, and the spec gives 2"
    for answer in ((None, 8), None):  # without a shape in the file, ONNX infers it
        with pytest.raises(UserError, match=message):
            put_batch_first(sine(answer), "m.onnx", [0], [2])
    model = sine(None)
    put_batch_first(model, "m.onnx", [1], [1])  # features first, in and out
    images = IMAGES.T.copy()
    np.testing.assert_allclose(run(model, images), np.sin(images), rtol=1e-5)
