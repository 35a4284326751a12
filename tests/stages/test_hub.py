"""Sources on the Hugging Face hub, with its own client and a loopback server: what a repository may hold and refuse."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import load_file, save, save_file

from build_tasks.formats.weight_license import stated_license
from tests.stages.test_weights import WeightsRun, add_shards, run_weights, spec
from tests.support.hub_server import HubServer, commit_of, serving
from tests.support.project import Project

INDEX = "model.safetensors.index.json"
ONNX_SPEC = """\
formats = ["onnx"]
[input]
shape = [3, 16, 16]
[weights]
source = "{}"
"""


class HubRun(NamedTuple):
    """A run of the weights stage, and the requests that the hub got."""

    run: WeightsRun
    requests: Counter[str]


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of the files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def doubled_tensors(path: Path) -> dict[str, Any]:
    """Twice the value of each tensor of a file, as other weights of the same network."""
    return {key: np.asarray(value * 2) for key, value in load_file(path).items()}


def write_network(folder: Path) -> dict[str, bytes]:
    """An ONNX file whose weights lie in two files beside it, by name."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = {"w8": (8, 3), "w4": (4, 8)}
    weights = [numpy_helper.from_array(rng.normal(size=n).astype("float32"), name) for name, n in shapes.items()]
    nodes = [
        helper.make_node("GlobalAveragePool", ["images"], ["means"]),
        helper.make_node("Flatten", ["means"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w8"], ["hidden"], transB=1),
        helper.make_node("Gemm", ["hidden", "w4"], ["scores"], transB=1),
    ]
    image = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, 16, 16])
    scores = helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 4])
    graph = helper.make_graph(nodes, "network", [image], [scores], weights)
    for tensor in graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, f"{tensor.name}.bin")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    return files_of(folder)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[HubServer]:
    """Repositories with a file, shards, and an ONNX file with external data; gated, moving and incomplete ones."""
    folder = tmp_path_factory.mktemp("repositories")
    (folder / "sharded").mkdir()
    add_shards(folder / "sharded", tiny_weights)
    shards = files_of(folder / "sharded")
    network = write_network(folder / "network")
    doubled = save(doubled_tensors(tiny_weights))
    file = {"model.safetensors": tiny_weights.read_bytes()}
    repositories = {
        "owner/one": {"main": {f"deep/folder/{name}": data for name, data in file.items()} | file | {
                          "README.md": b"---\nlicense: other\nlicense_name: research-only\n---\n# A network\n"},
                      "v2": {"model.safetensors": doubled}},
        "owner/sharded": {"main": shards, "v1": {f"fp32/{name}": data for name, data in shards.items()}},
        "owner/moving": {"main": shards},
        "owner/cut": {"main": {name: data for name, data in shards.items() if name != "part-2.safetensors"}},
        "owner/onnx": {"main": {f"onnx/{name}": data for name, data in network.items()} | {
                           "README.md": b"---\nlicense: mit\n---\n"}},
        "owner/partial": {"main": {name: data for name, data in network.items() if name != "w4.bin"}},
        "owner/gated": {"main": file},
    }  # fmt: skip
    with serving(HubServer(repositories, gated=("owner/gated",), moving=("owner/moving",))) as server:
        yield server


SOURCES = {
    "one": "hf://owner/one/model.safetensors@main",
    "deep": "hf://owner/one/deep/folder/model.safetensors",
    "tagged": "hf://owner/one/model.safetensors@v2",
    "pinned": f"hf://owner/one/model.safetensors@{commit_of('v2')}",
    "sharded": f"hf://owner/sharded/{INDEX}",
    "below": f"hf://owner/sharded/fp32/{INDEX}@v1",
    "moving": f"hf://owner/moving/{INDEX}@main",
    "cut": f"hf://owner/cut/{INDEX}@main",
    "gated": "hf://owner/gated/model.safetensors",
    "private": "hf://owner/no-such/model.safetensors",
    "revision": "hf://owner/one/model.safetensors@v9",
    "file": "hf://owner/one/other.safetensors@main",
}
SOURCES_FETCHED = ("one", "deep", "tagged", "pinned", "sharded", "below", "moving", "graph")
ONNX_SOURCES = {"graph": "hf://owner/onnx/onnx/model.onnx@main", "partial": "hf://owner/partial/model.onnx"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, hub: HubServer) -> HubRun:
    """One run over all sources, without a token."""
    project = Project(tmp_path_factory.mktemp("hub") / "project")
    for name, source in SOURCES.items():
        project.model(name, spec(source))
    for name, source in ONNX_SOURCES.items():
        project.model(name, ONNX_SPEC.format(source))
    home = str(tmp_path_factory.mktemp("home"))
    run = run_weights(project, "-n", "4", "--continue", "weights", HF_ENDPOINT=hub.url, HF_HOME=home, HF_TOKEN="")
    return HubRun(run, hub.requests.copy())


@pytest.mark.parametrize("model", ["one", "deep", "sharded", "below", "moving"])
def test_a_file_or_all_shards_of_the_hub_become_the_weights(found: HubRun, tiny_weights: Path, model: str) -> None:
    assert found.run.weights(model) == tiny_weights.read_bytes()


def test_a_tag_and_a_commit_are_revisions(found: HubRun, tiny_weights: Path) -> None:
    assert found.run.weights("tagged") == found.run.weights("pinned") != tiny_weights.read_bytes()


def test_shards_come_from_the_commit_of_their_index_without_a_further_look_at_the_branch(found: HubRun) -> None:
    """The branch `main` of owner/moving has another commit at each request."""
    assert found.requests[f"HEAD owner/moving/{INDEX}"] == 1
    assert "weights:moving" in found.run.run.ran


def test_external_data_of_an_onnx_file_comes_through_the_links_of_the_hub_cache(found: HubRun) -> None:
    assert "weights:graph" in found.run.run.ran, found.run.run.out
    graph = onnx.load_from_string(found.run.build["graph/weights.onnx"])
    assert {tensor.name: list(tensor.dims) for tensor in graph.graph.initializer} == {"w8": [8, 3], "w4": [4, 8]}


def test_the_license_of_a_repository_and_of_timm_reaches_the_bill_of_materials(found: HubRun, hub: HubServer) -> None:
    """A README without metadata, and a repository without one, name no license."""
    stated = {name: json.loads(found.run.build[f"{name}/weights.license.json"])["license"] for name in SOURCES_FETCHED}
    named = {"one": "research-only", "deep": "research-only", "graph": "mit"}
    assert stated == {**dict.fromkeys(SOURCES_FETCHED), **named}
    assert stated_license("timm://efficientnet_b0.ra_in1k", ask_hub=False) == "apache-2.0"
    assert stated_license("timm://efficientnet_b0.no_such_tag", ask_hub=False) is None
    project = found.run.project
    project.built("publish:graph_onnx", HF_ENDPOINT=hub.url, HF_HOME=str(project / "home"), HF_TOKEN="")
    bom = json.loads((project / "model_repository/graph_onnx/1/bom.cdx.json").read_text())
    (weights,) = (part for part in bom["components"] if part["bom-ref"] == "weights")
    assert weights["licenses"] == [{"license": {"id": "MIT"}}]


@pytest.mark.parametrize(
    ("model", "reason", "advice"),
    [
        ("cut", "Entry Not Found for url", f"put {INDEX} and the files that it names into models/cut"),
        ("partial", "Entry Not Found for url", "put model.onnx and the files that it names into models/partial"),
        (
            "gated",
            "owner/gated is gated: accept its terms at {}/owner/gated, and set HF_TOK",
            "models/gated/model.safe",
        ),
        ("private", "owner/no-such does not exist, or is private and HF_TOKEN has no", "models/private/model.safetens"),
        ("revision", "404 Client Error. Revision Not Found", "models/revision/model.safetensors"),
        ("file", "404 Client Error. Entry Not Found", "models/file/other.safetensors"),
    ],
)
def test_one_line_says_what_the_hub_refuses_and_what_to_do(
    found: HubRun, hub: HubServer, model: str, reason: str, advice: str
) -> None:
    line = found.run.failure(model)
    assert reason.format(hub.url) in line
    assert advice in line
    assert "Traceback" not in found.run.run.out


def test_a_gated_repository_opens_with_its_token_alone(tmp_path: Path, hub: HubServer, tiny_weights: Path) -> None:
    project = Project(tmp_path / "project")
    project.model("gated", spec(SOURCES["gated"]))
    options = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    wrong = run_weights(project, "weights", **options, HF_TOKEN="hf_wrong")
    assert "owner/gated is gated" in wrong.failure("gated")
    assert "hf_wrong" not in wrong.run.out
    assert run_weights(project, "weights", **options, HF_TOKEN=hub.TOKEN).weights("gated") == tiny_weights.read_bytes()


def test_shards_that_were_put_beside_the_spec_are_watched(tmp_path: Path, tiny_weights: Path) -> None:
    """The source is still the hub's, with a revision, and no request is sent."""
    project = Project(tmp_path / "project")
    folder = project.model("sharded", spec(SOURCES["moving"]))
    add_shards(folder, tiny_weights)
    assert run_weights(project, "weights").weights("sharded") == tiny_weights.read_bytes()
    save_file(doubled_tensors(folder / "part-2.safetensors"), folder / "part-2.safetensors")
    assert run_weights(project, "weights").weights("sharded") != tiny_weights.read_bytes()
    shutil.rmtree(project / "build")
