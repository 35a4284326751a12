"""Models whose source is an ONNX file: from `doit new --from-onnx` to the file that Triton serves."""

import json
import shutil
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build_tasks.doit_plugin.new_command import New
from build_tasks.errors import UserError
from build_tasks.runtime import worker
from build_tasks.spec.loader import load
from build_tasks.stages import weights
from tests.support.project import ROOT, Project, failure_line

if TYPE_CHECKING:
    import torch

SIDE = 16

# What forward() does besides, and the open axes.
GRAPHS: dict[str, tuple[str, dict[str, dict[int, str]]]] = {
    "open": ("", {"images": {0: "n"}, "scores": {0: "n"}}),
    "sizes": ("", {"images": {0: "n", 2: "h", 3: "w"}, "scores": {0: "n"}}),
    "fixed": ("", {}),
    "baked": ("reshape", {}),  # a node contains the batch of 2
}


@pytest.fixture(scope="session")
def network() -> "torch.nn.Module":
    import torch

    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 200, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(200, 4)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def graphs(tmp_path_factory: pytest.TempPathFactory, network: "torch.nn.Module") -> Path:
    """ONNX files of the network, as another program would write them."""
    import torch

    class Baked(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> Any:
            return network(images).reshape(2, 4)

    folder = tmp_path_factory.mktemp("graphs")
    for name, (body, axes) in GRAPHS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter is deprecated
            torch.onnx.export(
                Baked() if body else network,
                (torch.zeros(2, 3, SIDE, SIDE),),
                folder / f"{name}.onnx",
                dynamo=False,
                opset_version=13,
                input_names=["images"],
                output_names=["scores"],
                dynamic_axes=axes,
            )
    graph = onnx.load(folder / "open.onnx")
    onnx.save(graph, folder / "external.onnx", save_as_external_data=True, location="other.data", size_threshold=0)
    return folder


def config(project: Project, name: str) -> Any:
    return text_format.Parse((project / f"model_repository/{name}/config.pbtxt").read_text(), ModelConfig())


def run_published(project: Project, name: str, images: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    import onnxruntime

    session = onnxruntime.InferenceSession(str(project / f"model_repository/{name}/1/model.onnx"))
    (scores,) = session.run(["OUTPUT__0"], {"INPUT__0": images})
    found: np.ndarray[Any, Any] = scores
    return found


def random_images(batch: int, height: int = SIDE, width: int = SIDE) -> "np.ndarray[Any, Any]":
    return np.random.default_rng(batch).standard_normal((batch, 3, height, width)).astype(np.float32)


def expected(network: "torch.nn.Module", images: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    import torch

    with torch.inference_mode():
        answer: np.ndarray[Any, Any] = network(torch.from_numpy(images)).numpy()
    return answer


def add_model(project: Project, file: Path, name: str, more: str = "", top: str = "") -> None:
    """Add a model with this ONNX file as its source."""
    text = f'formats = ["onnx"]\nmax_batch_size = 4\n{top}\n[weights]\nsource = "{file.name}"\n'
    folder = project.model(name, f"{text}[input]\nshape = [3, {SIDE}, {SIDE}]\n{more}\n")
    shutil.copy(file, folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, graphs: Path) -> Project:
    project = Project(tmp_path_factory.mktemp("built") / "project")
    for name in ("open", "fixed", "baked"):
        project.built("new", "--from-onnx", str(graphs / f"{name}.onnx"))
    project.built("new", "external", "--from-onnx", str(graphs / "external.onnx"))
    project.edit("models/open/model.toml", '"tensorrt"', '"rtx"')  # its graph needs no GPU
    project.edit("models/open/model.toml", "# ensemble", "ensemble")
    add_model(project, graphs / "sizes.onnx", "sizes", "min_size = [16, 16]\nmax_size = [32, 24]")
    project.built(CUDA_VISIBLE_DEVICES="")
    return project


@pytest.mark.parametrize("name", ["open", "fixed", "external"])
def test_the_published_model_has_an_open_batch_and_the_same_outputs(
    built: Project, network: "torch.nn.Module", name: str
) -> None:
    """Also if the file has a fixed batch, but no node that depends on it."""
    (image,), (scores,) = config(built, f"{name}_onnx").input, config(built, f"{name}_onnx").output
    assert (image.name, list(image.dims), scores.name, list(scores.dims)) == (
        "INPUT__0",
        [3, SIDE, SIDE],
        "OUTPUT__0",
        [4],
    )
    assert config(built, f"{name}_onnx").max_batch_size == 32
    for batch in (1, 2, 5):
        images = random_images(batch)
        np.testing.assert_allclose(run_published(built, f"{name}_onnx", images), expected(network, images), atol=1e-5)


def test_a_batch_that_a_node_contains_is_kept(built: Project, network: "torch.nn.Module") -> None:
    spec = (built / "models/baked/model.toml").read_text()
    assert "dynamic_axes = false  " in spec
    assert "batch_size = 2\n" in spec
    found = config(built, "baked_onnx")
    assert (found.max_batch_size, list(found.input[0].dims)) == (0, [2, 3, SIDE, SIDE])
    images = random_images(2)
    np.testing.assert_allclose(run_published(built, "baked_onnx", images), expected(network, images), atol=1e-5)


def test_height_and_width_may_stay_open(built: Project, network: "torch.nn.Module") -> None:
    assert list(config(built, "sizes_onnx").input[0].dims) == [3, -1, -1]
    images = random_images(3, 32, 24)
    np.testing.assert_allclose(run_published(built, "sizes_onnx", images), expected(network, images), atol=1e-5)


def test_artifacts_are_compared_with_the_file_itself(built: Project, network: "torch.nn.Module") -> None:
    reference = json.loads((built / "build/open/reference.json").read_text())
    assert [runner for runner, _ in reference["lst"]] == [
        "onnxruntime-fp32",
        "onnxruntime-fp32, inputs perturbed by one ulp",
    ]
    summary = json.loads((built / "build/open/accuracy.json").read_text())
    assert [(row["artifact"], row["status"]) for row in summary["artifacts"]] == [("ONNX", "ok"), ("fp16 graph", "ok")]
    assert summary["artifacts"][0]["outputs"]["OUTPUT__0"]["relative_l2"] < 1e-6 < 1e-5
    assert summary["artifacts"][1]["outputs"]["OUTPUT__0"]["relative_l2"] > 1e-6
    assert "against ONNX Runtime fp32" in (built / "build/open/accuracy.svg").read_text()
    assert config(built, "open_ensemble").ensemble_scheduling.step[1].model_name == "open_onnx"


def test_external_weights_are_copied(built: Project) -> None:
    assert sorted(built.tree("models/external/model.onnx")) == ["model.onnx", "model.onnx.data"]


def test_an_edit_runs_the_stages_that_depend_on_it(built: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(built)
    assert project.built("open", CUDA_VISIBLE_DEVICES="").ran == []
    graph = onnx.load(project / "models/open/model.onnx")
    graph.producer_name = "another"
    onnx.save(graph, project / "models/open/model.onnx")
    tasks = ["reference:open", "onnx:open"]
    assert project.built(*tasks).ran == ["onnx:open", "reference:open", "weights:open"]
    project.edit("models/open/model.toml", "# dynamic_axes = true", "external_data = true")
    assert project.built(*tasks).ran == ["onnx:open"]
    assert "torchscript:open" not in project.built("list", "--all").out


def test_a_contradiction_between_spec_and_file_is_one_line(project: Project, graphs: Path) -> None:
    add_model(project, graphs / "baked.onnx", "opened")
    add_model(project, graphs / "open.onnx", "other", "[onnx]\ndynamic_axes = false\nbatch_size = 3")
    add_model(project, graphs / "open.onnx", "small")
    project.edit("models/small/model.toml", "[3, 16, 16]", "[3, 8, 16]")
    add_model(project, graphs / "open.onnx", "old", "[triton]\nrelease = '23.10'")
    graph = onnx.load(graphs / "open.onnx")
    graph.opset_import[0].version = 20
    onnx.save(graph, project / "models/old/open.onnx")
    run = project.doit()
    assert run.code == 1
    assert "publish:other_onnx" in run.ran
    assert list(config(project, "other_onnx").input[0].dims) == [3, 3, SIDE, SIDE]
    line = failure_line(run, "onnx:opened")
    assert "with an open batch the graph " in line
    assert line.endswith("its own is 2: onnx.dynamic_axes = false and onnx.batch_size = 2 keep it")
    assert failure_line(run, "weights:small").endswith(
        "input.shape: models/small/open.onnx takes [?, 3, 16, 16], not [3, 8, 16]"
    )
    assert "the graph has opset 20, and Triton 23.10 has ONNX Runtime" in failure_line(run, "config:old_onnx")


Shape = list[int | None]


def graph_of(inputs: list[tuple[str, int, Shape]], axes: list[int] | None = None) -> onnx.ModelProto:
    """A graph that adds its inputs, or takes the mean of its only input over some axes."""
    tensors = [helper.make_tensor_value_info(*each) for each in inputs]
    names = [name for name, _, _ in inputs]
    node = helper.make_node("ReduceMean", names, ["y"], axes=axes, keepdims=0) if axes else None
    output = helper.make_tensor_value_info("y", inputs[0][1], None)
    graph = helper.make_graph([node or helper.make_node("Sum", names, ["y"])], "g", tensors, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


FLOAT, IMAGES = TensorProto.FLOAT, [None, 3, 8, 8]
UNFIT = {
    "mixed": (
        graph_of([("x", FLOAT, [1, 3, 8, 8])], [0, 2, 3]),
        "mixed.onnx: the output OUTPUT__0 has shape [3] for a batch of 1; the batch must be its first dimension",
    ),
    "state": (  # the batch of one input is open, and that of the other is not
        graph_of([("x", FLOAT, [None, 6]), ("h", FLOAT, [1, 6])]),
        "Got invalid dimensions for input: h for the following indices index: 0 Got: 2 Expected: 1",
    ),
}


@pytest.fixture
def empty_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project without models; stages find the modules that they declare in it.

    The fork server of this process looks for modules where it was started. The folder of a test is removed after it.
    """
    monkeypatch.chdir(ROOT)
    worker.call(len, {}, log=str(tmp_path / "log"))
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    Path("build_tasks").symlink_to(ROOT / "build_tasks")


@pytest.mark.usefixtures("empty_project")
@pytest.mark.parametrize("name", [*UNFIT, "junk", "absent", "two words", "folder"])
def test_a_file_that_is_not_onnx_or_takes_no_images_is_refused_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    Path("junk.onnx").write_bytes(b"not ONNX")
    line = "cannot be read as ONNX: "
    if name in UNFIT:
        graph, line = UNFIT[name]
        onnx.save(graph, f"{name}.onnx")
    if name == "folder":
        Path("folder.onnx").mkdir()
        Path("folder.onnx/a.onnx").touch()
        line = "is a folder: expected an ONNX file, or a folder with folder.onnx in it, found a.onnx"
    if name == "two words":
        line = "models/two words: a model's name is made of letters"
    assert New().parse_execute(["--from-onnx", f"{name}.onnx"]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ERROR: ")
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert list(Path("models").iterdir()) == []


NO_PICTURES = {
    "nhwc": (graph_of([("x", FLOAT, [None, 24, 24, 3])], [1, 2]), '["onnx", "tensorrt"]', ["[24, 24, 3]"]),
    "two": (graph_of([("x", FLOAT, IMAGES), ("z", FLOAT, IMAGES)]), '["onnx", "tensorrt"]', 2 * ["[3, 8, 8]"]),
    "double": (graph_of([("x", TensorProto.DOUBLE, [None, None])], [1]), '["onnx"]', ['["x_1"]']),
}


@pytest.mark.usefixtures("empty_project")
@pytest.mark.parametrize("name", NO_PICTURES)
def test_a_file_that_takes_no_picture_gets_tables_of_its_inputs(name: str) -> None:
    graph, formats, shapes = NO_PICTURES[name]
    onnx.save(graph, f"{name}.onnx")
    assert New().parse_execute(["--from-onnx", f"{name}.onnx"]) == 0
    text = Path(f"models/{name}/model.toml").read_text()
    assert [each["shape"] for each in tomllib.loads(text)["inputs"]] == [json.loads(shape) for shape in shapes]
    assert f"formats = {formats}" in text
    assert "[input]" not in text


def recogniser() -> onnx.ModelProto:
    """(batch, 1, 16, 32) -> (time, batch, classes): time is the width, and the classes are the rows of the picture."""
    inputs = [value("image", ["batch", 1, 16, 32])]
    flat = helper.make_node("ReduceMean", ["image"], ["flat"], axes=[1], keepdims=0)
    node = helper.make_node("Transpose", ["flat"], ["logits"], perm=[2, 0, 1])
    return model_of([flat, node], inputs, [value("logits", [32, "batch", 16])])


def quantized() -> onnx.ModelProto:
    """A matrix product, quantized with the range of a whole batch."""
    matrix = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["back"]),
        helper.make_node("MatMul", ["back", "w"], ["y"]),
    ]
    weights = [onnx.numpy_helper.from_array(matrix, "w")]
    return model_of(nodes, [value("x", ["batch", "time", 6])], [value("y", ["batch", "time", 4])], weights)


def with_rate() -> onnx.ModelProto:
    """Samples and a state with its batch in the second dimension, and one sampling rate for all."""
    inputs = [value("x", ["batch", 6]), value("state", [2, "batch", 6]), value("rate", [])]
    nodes = [
        helper.make_node("Mul", ["x", "rate"], ["y"]),
        helper.make_node("Add", ["state", "y"], ["next"]),
    ]
    return model_of(nodes, inputs, [value("y", ["batch", 6]), value("next", [2, "batch", 6])])


def test_files_as_packages_ship_them(project: Project) -> None:
    """What `doit new` writes for them builds, or a line says why not and what to do."""
    graphs = {"recogniser": recogniser(), "quantized": quantized(), "rate": with_rate()}
    for name, graph in graphs.items():
        onnx.save(graph, project / f"{name}.onnx")
    scalar = "found rate, one value for all samples of a batch, which clients cannot send: make it a constant"
    refused = project.doit("new", "--from-onnx", "rate.onnx")
    assert (refused.code, scalar in refused.out) == (3, True), refused.out
    for name in ("recogniser", "quantized"):
        project.built("new", "--from-onnx", f"{name}.onnx")
    spec = (project / "models/quantized/model.toml").read_text()
    assert "dynamic_axes = false                  # DynamicQuantizeLinear takes one scale for a whole batch" in spec
    (project / "models/open").mkdir()
    (project / "models/open/model.toml").write_text(spec.replace("dynamic_axes = false", ""))
    shutil.copy(project / "quantized.onnx", project / "models/open/model.onnx")
    # The input of the spec has no batch either, if it names the rate.
    constant = graphs["rate"]
    (rate,) = [each for each in constant.graph.input if each.name == "rate"]
    constant.graph.input.remove(rate)
    constant.graph.initializer.append(onnx.numpy_helper.from_array(np.array(8, np.float32), "rate"))
    onnx.save(constant, project / "constant.onnx")
    project.built("new", "--from-onnx", "constant.onnx")
    run = project.doit()
    published = {name.removeprefix("publish:") for name in run.ran if name.startswith("publish:")}
    assert published == {"recogniser_onnx", "quantized_onnx", "constant_onnx"}, run.out
    found = config(project, "recogniser_onnx")
    assert (found.max_batch_size, list(found.output[0].dims)) == (32, [32, 16])
    assert config(project, "quantized_onnx").max_batch_size == 0
    advice = "its DynamicQuantizeLinear takes one scale for a whole batch, so that requests change each other: "
    (line,) = [line for line in run.out.splitlines() if line.split()[1:2] == ["✗"] or line.startswith("✗")]
    assert f"{advice}onnx.dynamic_axes = false serves one at a time" in line


@pytest.mark.usefixtures("empty_project")
def test_sizes_that_the_file_leaves_open_are_marked_in_the_spec() -> None:
    onnx.save(graph_of([("x", FLOAT, [None, 1, None, None])], [2, 3]), "grey.onnx")
    assert New().parse_execute(["grey", "--from-onnx", "grey.onnx"]) == 0
    text = Path("models/grey/model.toml").read_text()
    assert "shape = [1, 224, 224]                 # channels, height, width: the file leaves it open" in text
    assert "mean = [0.0]" in text
    assert Path("models/grey/model.onnx").read_bytes() == Path("grey.onnx").read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# Files as other programs write them


def value(name: str, dims: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, dims)


def model_of(nodes: list[onnx.NodeProto], inputs: Any, outputs: Any, weights: Any = ()) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def declared(graph: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The graph with another batch in every declaration."""
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    for tensor in (*changed.graph.input, *changed.graph.output):
        dim = tensor.type.tensor_type.shape.dim[0]
        dim.Clear()
        dim.dim_value = batch
    return changed


def renamed(graph: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    """The graph with other names of tensors."""
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    for node in changed.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for tensor in (*changed.graph.input, *changed.graph.output, *changed.graph.initializer, *changed.graph.value_info):
        tensor.name = names.get(tensor.name, tensor.name)
    return changed


def branching() -> onnx.ModelProto:
    """A graph with an If whose branches use an outer tensor called OUTPUT__0, and have a tensor called INPUT__0."""
    branches = {
        f"{branch}_branch": helper.make_graph(
            [helper.make_node("Neg", ["OUTPUT__0"], [name]), helper.make_node("Neg", [name], [f"{branch}_y"])],
            branch,
            [],
            [value(f"{branch}_y", [None, 3])],
        )
        for branch, name in (("then", "INPUT__0"), ("else", "inner"))
    }
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["flat"], axes=[2, 3], keepdims=0),
        helper.make_node("Relu", ["flat"], ["OUTPUT__0"]),
        helper.make_node("If", ["yes"], ["y"], **branches),
    ]
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    return model_of(nodes, [value("x", [None, 3, SIDE, SIDE])], [value("y", [None, 3])], [yes])


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, graphs: Path) -> Project:
    """Models of files that need more than a copy, each built as ONNX."""
    project = Project(tmp_path_factory.mktemp("foreign") / "project")
    files = tmp_path_factory.mktemp("files")
    graph = onnx.load(graphs / "open.onnx")
    first = graph.graph.node[0]
    inner = first.output[0]
    for name, changed in {
        "minus": declared(graph, -1),
        "zero": declared(graph, 0),
        "inner_input": renamed(graph, {inner: "INPUT__0"}),
        "inner_output": renamed(graph, {inner: "OUTPUT__0", first.input[1]: "INPUT__0"}),
        "swapped": renamed(graph, {"images": "OUTPUT__0", "scores": "INPUT__0"}),
    }.items():
        onnx.save(changed, files / f"{name}.onnx")
        add_model(project, files / f"{name}.onnx", name)
    graph.graph.output.append(value("images", ["n", 3, SIDE, SIDE]))
    onnx.save(graph, files / "same.onnx")
    add_model(project, files / "same.onnx", "same")
    onnx.save(branching(), files / "branching.onnx")
    add_model(project, files / "branching.onnx", "branching")
    cache = project / "models/cached/blobs"
    onnx.save(onnx.load(graphs / "open.onnx"), files / "cached.onnx", save_as_external_data=True,
              location="cached.onnx_data", size_threshold=0)  # fmt: skip
    add_model(project, files / "cached.onnx", "cached")
    cache.mkdir()
    for file in ("cached.onnx", "cached.onnx_data"):
        shutil.copy(files / file, cache / f"blob_of_{file}")
        (project / f"models/cached/{file}").unlink(missing_ok=True)
        (project / f"models/cached/{file}").symlink_to(f"blobs/blob_of_{file}")
    run = project.doit("onnx", "publish", CUDA_VISIBLE_DEVICES="")
    assert run.code == 0, run.out
    return project


@pytest.mark.parametrize("name", ["minus", "zero", "inner_input", "inner_output", "swapped", "cached", "same"])
def test_a_file_of_another_program_is_served_as_it_computes(
    foreign: Project, network: "torch.nn.Module", name: str
) -> None:
    """Open dimensions written as -1 or 0, names that this project uses, links of a cache, the input as an output."""
    assert config(foreign, f"{name}_onnx").max_batch_size == 4
    assert list(config(foreign, f"{name}_onnx").input[0].dims) == [3, SIDE, SIDE]
    for batch in (1, 3):
        images = random_images(batch)
        np.testing.assert_allclose(run_published(foreign, f"{name}_onnx", images), expected(network, images), atol=1e-5)


def test_an_output_that_is_the_input_is_served_too(foreign: Project) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(foreign / "model_repository/same_onnx/1/model.onnx"))
    images = random_images(2)
    np.testing.assert_array_equal(session.run(["OUTPUT__1"], {"INPUT__0": images})[0], images)


def test_one_of_several_inputs_that_is_an_output_gets_another_name_there(project: Project, tmp_path: Path) -> None:
    import onnxruntime

    x, ids, y = (
        helper.make_tensor_value_info(name, kind, ["n", *dims])
        for name, kind, dims in (
            ("x", TensorProto.FLOAT, [4]), ("ids", TensorProto.INT64, []), ("y", TensorProto.FLOAT, [4])
        )
    )  # fmt: skip
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x, ids], [y, ids])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "n.onnx")
    project.built("new", "net", "--from-onnx", str(tmp_path / "n.onnx"))
    project.built("publish:net_onnx")
    session = onnxruntime.InferenceSession(str(project / "model_repository/net_onnx/1/model.onnx"))
    feed = {"x": np.array([[-1, 2, -3, 4]], np.float32), "ids": np.array([7])}
    np.testing.assert_array_equal(session.run(["ids_1"], feed)[0], [7])
    np.testing.assert_array_equal(session.run(["y"], feed)[0], [[0, 2, 0, 4]])


def test_names_that_a_spec_cannot_have_get_others(project: Project, tmp_path: Path) -> None:
    """Exporters number the tensors that have no name."""
    import onnxruntime

    first, second = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, "n"]) for name in ("0", "x 1:0"))
    answer = helper.make_tensor_value_info("191", TensorProto.FLOAT, [4, "n"])
    graph = helper.make_graph([helper.make_node("Sub", ["0", "x 1:0"], ["191"])], "g", [first, second], [answer])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "n.onnx")
    project.built("new", "net", "--from-onnx", str(tmp_path / "n.onnx"))
    spec = tomllib.loads((project / "models/net/model.toml").read_text())
    assert [table["name"] for table in spec["inputs"]] == ["INPUT__0", "INPUT__1"]
    assert spec["outputs"] == [{"name": "OUTPUT__0", "key": "191", "batch_dimension": 1}]
    project.built("publish:net_onnx")
    session = onnxruntime.InferenceSession(str(project / "model_repository/net_onnx/1/model.onnx"))
    feed = {"INPUT__0": np.full((3, 4), 5, np.float32), "INPUT__1": np.full((3, 4), 2, np.float32)}
    np.testing.assert_array_equal(session.run(["OUTPUT__0"], feed)[0], np.full((3, 4), 3))


def test_an_output_without_a_batch_can_be_left_out(project: Project, tmp_path: Path) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    table = helper.make_tensor_value_info("anchors", TensorProto.FLOAT, [5, 4])
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Identity", ["rows"], ["anchors"])]
    rows = helper.make_tensor("rows", TensorProto.FLOAT, [5, 4], [1.0] * 20)
    graph = helper.make_graph(nodes, "g", [x], [y, table], [rows])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "n.onnx")
    refused = project.doit("new", "net", "--from-onnx", str(tmp_path / "n.onnx"))
    assert refused.code == 3
    line = "anchors has shape [5, 4] for a batch of 2; the batch must be its first dimension; to leave it out, name the"
    assert line in refused.out


def test_names_inside_a_branch_are_kept_apart(foreign: Project) -> None:
    images = random_images(2)
    relu = np.maximum(images.mean(axis=(2, 3)), 0)
    np.testing.assert_allclose(run_published(foreign, "branching_onnx", images), relu, atol=1e-6)


def test_external_data_is_an_input_of_the_build(foreign: Project, copy_of: Callable[[Project], Project]) -> None:
    project = copy_of(foreign)
    assert project.built("weights:cached").ran == []
    data = project / "models/cached/cached.onnx_data"
    data.write_bytes(bytes(data.stat().st_size))
    assert project.built("weights:cached").ran == ["weights:cached"]


def test_external_data_of_any_name_is_watched(project: Project, graphs: Path) -> None:
    for name, location in (("other", "Gewichte ä.bin"), ("below", "data/weights")):
        add_model(project, graphs / "open.onnx", name)
        folder = project / f"models/{name}"
        (folder / location).parent.mkdir(exist_ok=True)
        onnx.save(onnx.load(graphs / "open.onnx"), folder / "open.onnx", save_as_external_data=True, location=location,
                  size_threshold=0)  # fmt: skip
    tasks = ["weights:below", "weights:other"]
    assert project.built("weights").ran == tasks
    for data in (project / "models/other/Gewichte ä.bin", project / "models/below/data/weights"):
        data.write_bytes(bytes(data.stat().st_size))
    assert project.built("weights").ran == tasks


def external(folder: Path, location: str, graph: onnx.ModelProto) -> Path:
    """A file whose graph names this location of its data."""
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    for tensor in changed.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
    (folder / "model.onnx").write_bytes(changed.SerializeToString())
    return folder / "model.onnx"


@pytest.mark.usefixtures("empty_project")
@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("absent", "its weights are in 'absent.data', which does not exist; put that file beside it"),
        ("upwards", "expected external data in its own folder, found the path '../secret'"),
        ("absolute", "expected external data in its own folder, found the path '/"),
        ("linked", "found 'linked.data', which leads to '/"),
        ("short", "short.data ends before the data of "),
        ("twins", "expected outputs with different names, found two called 'scores'"),
        ("pointer", "is a pointer of Git LFS, not the file itself: run `git lfs pull` in its repository"),
    ],
)
def test_a_file_whose_parts_are_missing_or_elsewhere_is_refused(
    tmp_path: Path, graphs: Path, capsys: pytest.CaptureFixture[str], case: str, line: str
) -> None:
    graph = onnx.load(graphs / "open.onnx")
    folder = tmp_path / "files"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(1 << 16))
    if case == "linked":
        (folder / "linked.data").symlink_to(tmp_path / "secret")
    if case == "short":
        onnx.save(graph, folder / "model.onnx", save_as_external_data=True, location="short.data", size_threshold=0)
        with (folder / "short.data").open("r+b") as data:
            data.truncate(10)
    elif case == "pointer":
        (folder / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    elif case == "twins":
        graph.graph.output.append(graph.graph.output[0])
        onnx.save(graph, folder / "model.onnx")
    else:
        locations = {"upwards": "../secret", "absolute": str(tmp_path / "secret")}
        external(folder, locations.get(case, f"{case}.data"), graph)
    assert New().parse_execute(["new_one", "--from-onnx", str(folder / "model.onnx")]) == 3
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert list(Path("models").iterdir()) == []


def flat_network(weight: Any = 1.0, **field: str) -> onnx.ModelProto:
    """One convolution over the whole picture. `field` is one of external data, beside its location."""
    values = onnx.numpy_helper.from_array(np.full((4, 3, 8, 8), weight, "float32"), "weight")
    if field:
        values.ClearField("raw_data")
        values.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "source.onnx", **field}.items():
            values.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("Conv", ["x", "weight"], ["scores"]),
        helper.make_node("SequenceConstruct", ["scores"], ["list"]),
    ]
    inputs = [helper.make_tensor_value_info("x", FLOAT, IMAGES)]
    outputs = [helper.make_tensor_value_info("scores", FLOAT, [None, 4, 1, 1])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [values])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def sequence_network() -> onnx.ModelProto:
    """Its second output is a list, as classifiers of scikit-learn have one (ZipMap)."""
    model = flat_network()
    model.graph.output.append(helper.make_tensor_sequence_value_info("list", FLOAT, None))
    return model


NOT_SERVED: dict[str, tuple[Callable[[], Any], str]] = {
    "sequence": (sequence_network, "expected outputs that are tensors, found 'list', a sequence, as ZipMap makes it"),
    "nan": (lambda: flat_network(float("nan")), "answers NaN or infinity; these are in weight: train it again"),
    "infinity": (lambda: flat_network(float("inf")), "answers NaN or infinity; these are in weight"),
    "nan in one row": (
        lambda: flat_network(np.array([np.nan, 1, 1, 1]).reshape(4, 1, 1, 1)),
        "answers NaN or infinity; these are in weight: train it again",
    ),
    "offset": (lambda: flat_network(offset="-5"), "expected a number as the offset of 'weight', found '-5'"),
    "length": (lambda: flat_network(length="many"), "expected a number as the length of 'weight', found 'many'"),
    "page": (lambda: b"<!DOCTYPE html><title>Sign in</title>", "cannot be read as ONNX: it is a web page"),
    "empty": (lambda: b"", "cannot be read as ONNX: it is empty"),
}


@pytest.mark.usefixtures("empty_project")
@pytest.mark.parametrize("case", NOT_SERVED)
def test_the_stage_refuses_in_one_line_what_no_server_could_use(case: str) -> None:
    make, line = NOT_SERVED[case]
    folder = Path("models/net")
    folder.mkdir()
    source = make()
    (folder / "source.onnx").write_bytes(source if isinstance(source, bytes) else source.SerializeToString())
    (folder / "model.toml").write_text(
        'formats = ["onnx"]\n[weights]\nsource = "source.onnx"\n[input]\nshape = [3, 8, 8]\n'
    )
    [model] = load()
    Path("build/net").mkdir(parents=True)
    stage = weights.stage(model)
    with pytest.raises(UserError) as refused:
        stage.build(stage.inputs, stage.outputs, stage.settings)
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)
