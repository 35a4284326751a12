"""Graphs of reduced precision: types, excluded nodes, gate results; a graph that fails is not compiled."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.support import tiny_network
from tests.support.project import ROOT, Project, Run, failure_line

RESNET = """\
formats = ["rtx"]
max_batch_size = 2

[architecture]
timm = "test_resnet"

[weights]
source = "random://0"

[onnx]
{onnx}

[engine]
precision = "{precision}"
{engine}
"""

FIXED = "dynamic_axes = false\nbatch_size = 2"
EXTERNAL = "external_data = true"
OPEN = "min_size = [12, 14]\nmax_size = [20, 24]"


def resnet(project: Project, name: str, precision: str = "int8", engine: str = "", onnx: str = "") -> Path:
    return project.model(name, RESNET.format(precision=precision, engine=engine, onnx=onnx))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Run]:
    """A project with many models, and its only run, in which some of them fail."""
    project = Project(tmp_path_factory.mktemp("zoo") / "project")
    tiny_network.add(project, "plain")
    tiny_network.add(project, "by_type", 'keep_fp32 = ["Conv"]')
    tiny_network.add(project, "by_name", 'keep_fp32 = ["/C.*v"]')
    tiny_network.add(project, "misspelt", 'keep_fp32 = ["Cnv"]')
    tiny_network.add(project, "far_off", 'keep_fp32 = ["attention"]')
    tiny_network.add(project, "half", "keep_io_types = false")
    tiny_network.add(project, "bf16", 'precision = "bf16"')
    tiny_network.add(project, "strict", formats='"onnx", "rtx"')
    gate(project, "strict", "relative_l2 = 1e-9")
    tiny_network.add(project, "fixed", onnx=FIXED)
    tiny_network.add(project, "opset11", onnx="opset = 11")
    tiny_network.add(project, "open", input_table=OPEN)
    tiny_network.add(project, "open_dynamo", input_table=OPEN, onnx='exporter = "dynamo"\nopset = 18')
    resnet(project, "int8")
    resnet(project, "fp8", "fp8")
    resnet(project, "int8_kept", engine='keep_fp32 = ["Gemm"]')
    resnet(project, "int8_kept_node", engine='keep_fp32 = [".*Gemm.*"]')
    resnet(project, "int8_fixed", onnx=FIXED)
    resnet(project, "int8_external", onnx=EXTERNAL)
    resnet(project, "fp16_external", "fp16", onnx=EXTERNAL)
    resnet(project, "nothing_to_see", engine='calibration = "pictures"')
    (project / "models/nothing_to_see/pictures").mkdir()
    tiny_network.add(project, "not_worth_it", 'precision = "int8"')
    calibrated = resnet(project, "calibrated", engine='calibration = "pictures"')
    (calibrated / "pictures").mkdir()
    shutil.copy(ROOT / "build_tasks/verification/photographs/coffee.jpg", calibrated / "pictures")
    return project, project.doit()


def gate(project: Project, name: str, limits: str) -> None:
    spec = project / f"models/{name}/model.toml"
    spec.write_text(f'{spec.read_text()}\n[[accuracy.gate]]\nformat = "graph"\n{limits}\n')


def graph(project: Project, path: str) -> onnx.GraphProto:
    return onnx.load(project / "build" / path).graph


def weights(graph: onnx.GraphProto) -> dict[str, set[int]]:
    """The element types of the weights, biases and scales, by the type of the operator that they belong to."""
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    found: dict[str, set[int]] = {}
    for node in graph.node:
        if element_types := {kinds[name] for name in node.input if name in kinds}:
            found.setdefault(node.op_type, set()).update(element_types)
    return found


def verdict(project: Project, path: str) -> str:
    return str(json.loads((project / f"build/{path}.verdict.json").read_text())["status"])


def error(project: Project, path: str) -> float:
    measured = json.loads((project / f"build/{path}.measured.json").read_text())
    return float(measured["outputs"]["OUTPUT__0"]["relative_l2"])


def test_an_fp16_graph_has_fp32_inputs_and_outputs(zoo: tuple[Project, Run]) -> None:
    project, run = zoo
    assert weights(graph(project, "plain/model.fp16.onnx")) == {"Conv": {TensorProto.FLOAT16}, "Gemm": {10}}
    signature = json.loads((project / "build/plain/model.fp16.onnx.signature.json").read_text())
    assert [t["dtype"] for t in (*signature["inputs"], *signature["outputs"])] == ["float32", "float32"]
    assert {"precision:plain.fp16", "measure:plain.fp16", "accuracy:plain.fp16", "rtx:plain"} <= {*run.ran}
    assert verdict(project, "plain/model.fp16.onnx") == "ok"
    assert 1e-5 < error(project, "plain/model.fp16.onnx") < 1e-2, "the rounding of fp16"


@pytest.mark.parametrize("name", ["by_type", "by_name"])
def test_keep_fp32_by_operator_type_and_by_regular_expression(zoo: tuple[Project, Run], name: str) -> None:
    project, run = zoo
    assert weights(graph(project, f"{name}/model.fp16.onnx")) == {"Conv": {TensorProto.FLOAT}, "Gemm": {10}}
    assert f"rtx:{name}" in run.ran


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("misspelt", "engine.keep_fp32: no operator type and no node is called 'Cnv'; did you mean 'Conv' or '/Conv'?"),
        (
            "far_off",
            "engine.keep_fp32: no operator type and no node is called 'attention'; operators: Conv, Gemm, ReduceMean",
        ),
    ],
)
def test_a_wrong_entry_of_keep_fp32_is_one_line_with_the_valid_names(
    zoo: tuple[Project, Run], name: str, line: str
) -> None:
    _, run = zoo
    assert line in failure_line(run, f"precision:{name}.fp16")


@pytest.mark.parametrize("name", ["int8_kept", "int8_kept_node"])
def test_nodes_that_int8_keeps_in_fp32_are_neither_quantized_nor_cast(zoo: tuple[Project, Run], name: str) -> None:
    project, run = zoo
    found = weights(graph(project, f"{name}/model.int8.onnx"))
    assert found["Gemm"] == {TensorProto.FLOAT}
    assert TensorProto.INT8 in found["DequantizeLinear"], "the convolutions are int8"
    assert f"rtx:{name}" in run.ran


def test_without_keep_io_types_clients_send_and_get_fp16(zoo: tuple[Project, Run]) -> None:
    project, run = zoo
    for file in ("model.fp16.onnx", "model.rtx"):
        signature = json.loads((project / f"build/half/{file}.signature.json").read_text())
        assert [t["dtype"] for t in (*signature["inputs"], *signature["outputs"])] == ["float16", "float16"]
    assert "Cast" not in {node.op_type for node in graph(project, "half/model.fp16.onnx").node}
    assert verdict(project, "half/model.fp16.onnx") == "ok"
    assert "rtx:half" in run.ran


def test_bf16_is_judged_with_the_rounding_of_bf16(zoo: tuple[Project, Run]) -> None:
    """On the samples, ONNX Runtime's outputs equal those of torch's bfloat16, and are less exact than fp16."""
    import torch
    from polygraphy.json import load_json
    from safetensors.torch import load_file
    from torch import nn

    from build_tasks.formats.onnx_runtime import reduced_session

    project, run = zoo
    assert weights(graph(project, "bf16/model.bf16.onnx"))["Conv"] == {TensorProto.BFLOAT16}
    batch = load_json(str(project / "build/bf16/samples.json"))[0]["INPUT__0"]
    (found,) = reduced_session(str(project / "build/bf16/model.bf16.onnx"))({"INPUT__0": batch})
    state = load_file(project / "build/bf16/weights.safetensors")
    layers = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "head": nn.Linear(5, 4)})
    layers.load_state_dict(state)

    def answers(dtype: torch.dtype) -> np.ndarray:
        layers.to(dtype)
        with torch.inference_mode():
            features = layers["conv"](torch.from_numpy(batch).to(dtype)).mean(dim=(2, 3))
            result: np.ndarray = layers["head"](features).float().numpy()
        return result

    exact = answers(torch.float32)  # the next call rounds the weights
    rounded = answers(torch.bfloat16)
    np.testing.assert_allclose(found, rounded, atol=2**-8 * np.abs(rounded).max())
    difference = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    assert error(project, "bf16/model.bf16.onnx") == pytest.approx(difference, rel=5e-3)  # it has three digits
    assert difference > 5 * error(project, "plain/model.fp16.onnx")
    assert "rtx:bf16" in run.ran


def test_every_result_of_a_bf16_graph_is_rounded() -> None:
    """Elementwise operators have one order of computation: every bit equals torch in bfloat16."""
    import onnxruntime
    import torch

    from build_tasks.formats.onnx_runtime import computes_bf16, emulate_bf16

    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(5, 7, generator=generator) for _ in range(3))
    bf16 = TensorProto.BFLOAT16

    def constant(value: torch.Tensor, name: str) -> TensorProto:
        return helper.make_tensor(name, bf16, value.shape, value.flatten().tolist())

    nodes = [
        helper.make_node("Cast", ["x"], ["narrow"], to=bf16),
        helper.make_node("Constant", [], ["bias"], value=constant(bias, "b")),
        helper.make_node("Mul", ["narrow", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Div", ["sum", "weight"], ["ratio"]),
        helper.make_node("Cast", ["ratio"], ["y"], to=TensorProto.FLOAT),
    ]
    shape = [5, 7]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "bf16",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            [constant(weight, "weight")],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    onnx.checker.check_model(model, full_check=True)
    assert computes_bf16(model)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(emulate_bf16(model).SerializeToString(), options)
    (found,) = session.run(None, {"x": x.numpy()})
    narrow, w, b = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    np.testing.assert_array_equal(found, ((narrow * w + b) / w).float().numpy())
    assert not np.array_equal(found, ((x * weight + bias) / weight).numpy())


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_quantized_graphs_hold_qdq_pairs(zoo: tuple[Project, Run], precision: str) -> None:
    project, run = zoo
    kinds = [node.op_type for node in graph(project, f"{precision}/model.{precision}.onnx").node]
    assert kinds.count("QuantizeLinear") > 10
    assert f"rtx:{precision}" in run.ran


def test_int8_takes_its_scales_from_the_calibration_folder_of_the_spec(
    zoo: tuple[Project, Run], tmp_path: Path, copy_of: Callable[[Project], Project]
) -> None:
    project, run = zoo
    assert "rtx:calibrated" in run.ran

    def scales(name: str) -> list[float]:
        found = graph(project, f"{name}/model.int8.onnx")
        names = {node.input[1] for node in found.node if node.op_type == "QuantizeLinear"}
        return [float(numpy_helper.to_array(t).max()) for t in found.initializer if t.name in names]

    assert len(scales("calibrated")) == len(scales("int8"))
    assert scales("calibrated") != scales("int8"), "the same network, calibrated with one of the seven images"
    project = copy_of(project)
    shutil.copy(ROOT / "build_tasks/verification/photographs/camera.jpg", project / "models/calibrated/pictures")
    graph_tasks = [f"{stage}:calibrated.int8" for stage in ("accuracy", "measure", "precision")]
    assert project.built("calibrated").ran == [*graph_tasks, "rtx:calibrated", "summary:calibrated"]


def test_an_empty_calibration_folder_is_an_error(zoo: tuple[Project, Run]) -> None:
    _, run = zoo
    line = failure_line(run, "precision:nothing_to_see.int8")
    assert line.endswith(
        "models/nothing_to_see/pictures: the folder contains no pictures (.jpg, .jpeg, .png, .webp, .bmp)"
    )


def test_a_graph_that_the_gate_refuses_is_not_compiled(zoo: tuple[Project, Run]) -> None:
    project, run = zoo
    line = failure_line(run, "accuracy:strict.fp16")
    assert "output OUTPUT__0: relative L2 error" in line
    assert "limit 1.0e-09" in line
    assert "`doit repair:strict` finds the nodes to exclude from fp16; or try another engine.precision" in line
    assert 'an [[accuracy.gate]] with precision = "fp16"' in line
    assert "layer by layer: build/strict/logs/accuracy.strict.fp16.log, or `doit layers:strict`" in line
    assert run.code == 1
    (blocked,) = [line for line in run.out.splitlines() if line.startswith("skipped: a dependency failed")]
    assert re.search(r"rtx:strict|tasks that need accuracy:strict\.fp16", blocked)
    assert not (project / "build/strict/model.rtx").exists()
    assert "publish:strict_onnx" in run.ran


@pytest.mark.parametrize(
    "name",
    ["fixed", "int8_fixed", "int8_external", "fp16_external", "opset11", "open", "open_dynamo"],
)
def test_every_form_of_graph_is_compiled(zoo: tuple[Project, Run], name: str) -> None:
    project, run = zoo
    precision = "int8" if "int8" in name else "fp16"
    assert f"precision:{name}.{precision}" in run.ran, run.out
    assert f"rtx:{name}" in run.ran
    assert (project / f"build/{name}/model.{precision}.onnx").is_dir() == ("external" in name)


def test_open_height_and_width_reach_the_profile(zoo: tuple[Project, Run]) -> None:
    project, _ = zoo
    for name in ("open", "open_dynamo"):
        signature = json.loads((project / f"build/{name}/model.rtx.signature.json").read_text())
        assert signature["inputs"][0]["shape"] == [-1, 3, -1, -1]
        profile = {"min": [1, 3, 12, 14], "opt": [3, 3, 16, 16], "max": [3, 3, 20, 24]}
        assert signature["profiles"] == [{"INPUT__0": profile}]


def test_a_fixed_batch_leaves_no_profile(zoo: tuple[Project, Run]) -> None:
    project, _ = zoo
    signature = json.loads((project / "build/fixed/model.rtx.signature.json").read_text())
    assert (signature["inputs"][0]["shape"], signature["profiles"]) == ([2, 3, 16, 16], [])


def test_a_graph_with_nothing_to_quantize_is_an_error(zoo: tuple[Project, Run]) -> None:
    line = failure_line(zoo[1], "precision:not_worth_it.int8")
    assert "modelopt finds no node in the graph that is worth quantizing to int8" in line


def test_everything_else_of_the_run_succeeded(zoo: tuple[Project, Run]) -> None:
    _, run = zoo
    assert run.code == 1, run.out
    assert set(run.failed) == {
        "precision:misspelt.fp16",
        "precision:far_off.fp16",
        "precision:nothing_to_see.int8",
        "precision:not_worth_it.int8",
        "accuracy:strict.fp16",
    }


def test_two_builds_give_the_same_bytes(zoo: tuple[Project, Run], tmp_path: Path) -> None:
    """In another folder, with another hash seed. Engines differ: TensorRT-RTX numbers its tensors anew in every run."""
    project, _ = zoo
    other = Project(tmp_path / "a" / "longer" / "path")
    tiny_network.add(other, "plain")
    resnet(other, "int8")
    other.built("precision:plain.fp16", "precision:int8.int8", PYTHONHASHSEED="20261123")
    for file in ("plain/model.fp16.onnx", "int8/model.int8.onnx"):
        assert (other / "build" / file).read_bytes() == (project / "build" / file).read_bytes(), file
