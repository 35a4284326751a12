"""Weights below the smallest number of fp16 keep their sign in the fp16 graph."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from build_tasks.formats.reduced_precision import convert_graph

SMALLEST = np.float16(2.0**-24)
BIAS = [-1e-9, 1e-9, 0, -4e-8]


def linear(weights: Any, bias: Any) -> onnx.ModelProto:
    """Two layers with the same weights and biases."""
    nodes = [
        helper.make_node("Gemm", ["x", "weights", "bias"], ["y"], name="first"),
        helper.make_node("Gemm", ["y", "weights", "bias"], ["z"], name="second"),
    ]
    tensors = [("weights", np.asarray(weights, np.float32)), ("bias", np.asarray(bias, np.float32))]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xz"]
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors]
    graph = helper.make_graph(nodes, "linear", values[:1], values[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def converted(source: onnx.ModelProto, folder: Path, excluded: list[str], precision: str = "fp16") -> dict[str, Any]:
    """The weights of each node in the converted graph."""
    settings = {"keep_fp32": [], "precision": precision, "keep_io_types": True}
    graph = convert_graph(source, None, settings, excluded, str(folder)).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return {node.name: [tensors[name] for name in node.input if name in tensors] for node in graph.node}


def test_small_negative_biases_stay_negative(tmp_path: Path) -> None:
    source = linear(np.eye(4), BIAS)
    before = source.SerializeToString()
    nodes = converted(source, tmp_path, [])
    for name in ("first", "second"):
        assert nodes[name][1].tolist() == [-SMALLEST, SMALLEST, 0, -SMALLEST]
    assert source.SerializeToString() == before


def test_an_excluded_node_keeps_its_biases(tmp_path: Path) -> None:
    nodes = converted(linear(np.eye(4), BIAS), tmp_path, ["second"])
    assert nodes["first"][1].tolist() == [-SMALLEST, SMALLEST, 0, -SMALLEST]
    np.testing.assert_array_equal(nodes["second"][1], np.asarray(BIAS, np.float32))


@pytest.mark.parametrize(("weight", "expected"), [(-1e-9, SMALLEST), (-1e-3, np.float16(-1e-3))])
def test_a_tensor_in_which_they_do_not_matter_stays_as_autocast_writes_it(
    tmp_path: Path, weight: float, expected: float
) -> None:
    weights = np.eye(4)
    weights[0, 1] = weight
    nodes = converted(linear(weights, BIAS), tmp_path, [])
    assert nodes["first"][0][0, 1] == expected
