"""onnx.precision: Triton serves a graph of reduced precision as model.onnx, gated by the limits of that precision."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from build_tasks.errors import UserError
from build_tasks.formats.reduced_precision import cast_graph
from tests.support import tiny_network
from tests.support.project import Project, failure_line

FLOAT = onnx.TensorProto.FLOAT

ACCELERATOR = """
[triton.onnx]
optimization = { execution_accelerators = { gpu_execution_accelerator = [{ name = "tensorrt" }] } }
"""


def weight_types(project: Project, name: str) -> set[int]:
    graph = onnx.load(project / f"model_repository/{name}_onnx/1/model.onnx").graph
    assert {tensor.type.tensor_type.elem_type for tensor in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    return {tensor.data_type for tensor in graph.initializer if tensor.dims}


def test_a_graph_in_fp16_is_served_and_compiled_and_measured_once(project: Project) -> None:
    tiny_network.add(project, "net", onnx='precision = "fp16"', formats='"onnx", "rtx"')
    run = project.built()
    assert [task for task in run.ran if "fp16" in task] == ["precision:net.fp16"]
    assert {"measure:net_onnx", "accuracy:net_onnx", "rtx:net", "publish:net_onnx"} <= set(run.ran)
    assert weight_types(project, "net") == {onnx.TensorProto.FLOAT16}
    row = json.loads((project / "build/net/accuracy.json").read_text())["artifacts"][0]
    assert (row["artifact"], row["file"]) == ("fp16 ONNX", "model.fp16.onnx")
    assert row["outputs"]["OUTPUT__0"]["limits"]["relative_l2"] >= 1e-2
    assert project.built().ran == []
    project.edit("models/net/model.toml", 'precision = "fp16"', 'precision = "fp32"')
    run = project.built()
    assert {"measure:net.fp16", "accuracy:net.fp16", "measure:net_onnx", "publish:net_onnx"} <= set(run.ran)
    assert not {"onnx:net", "precision:net.fp16", "rtx:net"} & set(run.ran)
    assert weight_types(project, "net") == {onnx.TensorProto.FLOAT}


def test_without_an_engine_too_and_the_gate_says_what_to_do(project: Project) -> None:
    folder = tiny_network.add(project, "alone", onnx='precision = "bf16"', formats='"onnx"')
    spec = (folder / "model.toml").read_text()
    (folder / "model.toml").write_text(spec + ACCELERATOR)
    run = project.built()
    assert "precision:alone.bf16" in run.ran
    assert weight_types(project, "alone") == {onnx.TensorProto.BFLOAT16}
    (folder / "model.toml").write_text(f"{spec}{ACCELERATOR}[[accuracy.gate]]\nrelative_l2 = 1e-9\n")
    message = failure_line(project.doit(), "accuracy:alone_onnx")
    assert "try another onnx.precision (fp32 serves model.onnx itself), nodes in engine.keep_fp32" in message


@pytest.mark.parametrize(
    ("formats", "table", "engine", "mistake"),
    [
        ('"rtx"', 'precision = "fp16"', "", "onnx.precision: expected fp32, since formats has no onnx to serve"),
        ('"onnx"', 'precision = "bf16"', "", "onnx.precision: expected fp16 or fp32: bf16 needs"),
        ('"onnx", "rtx"', 'precision = "fp16"', "keep_io_types = false", "engine.keep_io_types: expected true"),
        ('"onnx"', 'precision = "int8"', "", "onnx.precision: expected one of fp32, fp16, bf16, found 'int8'"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused(
    project: Project, formats: str, table: str, engine: str, mistake: str
) -> None:
    tiny_network.add(project, "net", engine, onnx=table, formats=formats)
    run = project.doit("list")
    assert run.code == 3
    assert mistake in run.out


def branch(name: str, node: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph([node], name, [], [helper.make_tensor_value_info(node.output[0], FLOAT, None)])


def nested_branches() -> list[onnx.NodeProto]:
    """An If whose branch holds another If, both with a tensor of the graph around them."""
    inner = helper.make_node(
        "If", ["few"], ["d"], name="inner",
        then_branch=branch("a", helper.make_node("Add", ["m", "m"], ["a"], name="add")),
        else_branch=branch("b", helper.make_node("Neg", ["m"], ["b"], name="negative")),
    )  # fmt: skip
    other = branch("e", helper.make_node("Exp", ["m"], ["e"], name="exponent"))
    return [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="product"),
        helper.make_node("ReduceSum", ["x"], ["sum"], name="sum", keepdims=0),
        helper.make_node("Less", ["sum", "sum"], ["few"], name="less"),
        helper.make_node("If", ["few"], ["y"], name="outer", then_branch=branch("c", inner), else_branch=other),
    ]


@pytest.mark.parametrize(
    ("nodes", "advice"),
    [
        (
            nested_branches(),
            'it does not cast what the branches of If outer use: set the precision to "fp32", or export the network',
        ),
        (
            [helper.make_node("FastGelu", ["x"], ["y"], name="gelu", domain="com.microsoft")],
            "TensorRT does not have FastGelu, an operator of com.microsoft: leave the engine out of formats",
        ),
    ],
)
def test_what_autocast_cannot_cast_is_named(tmp_path: Path, nodes: list[onnx.NodeProto], advice: str) -> None:
    x, y = (helper.make_tensor_value_info(name, FLOAT, ["n", 4]) for name in "xy")
    weights = [onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "model.onnx")
    with pytest.raises(UserError, match="AutoCast cannot convert the graph to fp16: ") as error:
        cast_graph(str(tmp_path / "model.onnx"), [], [], {"precision": "fp16", "keep_io_types": True})
    assert advice in str(error.value)
