"""What clients send and receive: bytes in, probabilities and top classes out, pictures preprocessed as by timm."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from polygraphy.comparator import IterationResult

from build_tasks.formats import picture_transform
from build_tasks.formats.serving_interface import normalize_input
from build_tasks.spec.interface import interface_of
from build_tasks.spec.model import Spec
from build_tasks.spec.tables import Input, Weights
from build_tasks.triton.preprocess_model.preprocessing import PictureError, preprocess
from build_tasks.verification import gate, metrics
from tests.support import tiny_network
from tests.support.project import ROOT, Project, failure_line

BYTES = 'format = "uint8_nhwc"\nmean = [0.4, 0.5, 0.6]\nstd = [0.2, 0.25, 0.3]'
TOP_2 = "[output]\nsoftmax = true\ntop_k = 2\n"
PICTURES = sorted((ROOT / "build_tasks/verification/photographs").glob("*.jpg"))


def add(project: Project, name: str, output: str = TOP_2, **more: Any) -> None:
    """Add a model with the tiny network; `output` is its table [output], `more` goes to tiny_network.add."""
    folder = tiny_network.add(project, name, **more)
    spec = folder / "model.toml"
    spec.write_text(f"{spec.read_text()}\n{output}")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The same weights without changes, and from bytes to top classes: by dynamo, in bf16, with open sizes."""
    project = Project(tmp_path_factory.mktemp("interface") / "project")
    formats = '"torchscript", "onnx"'
    tiny_network.add(project, "plain", formats=formats)
    add(project, "bytes", input_table=BYTES, formats=f'{formats}, "rtx"')
    add(project, "dynamo", input_table=BYTES, formats=formats, onnx='exporter = "dynamo"\nopset = 18')
    add(project, "old", input_table=BYTES, formats=formats, onnx="opset = 11")
    add(project, "sizes", input_table=f"{BYTES}\nmin_size = [16, 16]\nmax_size = [32, 24]", formats=f'{formats}, "rtx"')
    add(project, "bf16", input_table=BYTES, formats='"rtx"', engine='precision = "bf16"')
    project.built()
    return project


def expected(project: Project, batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two largest probabilities by the plain network, and their classes."""
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.25, 0.3])
    normalized = ((batch / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    scores = torch.jit.load(project / "build/plain/model.pt")(torch.from_numpy(normalized)).numpy()
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    classes = np.argsort(-shares, axis=1)[:, :2]
    return np.take_along_axis(shares, classes, axis=1), classes


def run(project: Project, name: str, batch: np.ndarray) -> dict[str, list[np.ndarray]]:
    """The outputs of a model for a batch, by format."""
    session = onnxruntime.InferenceSession(project / f"build/{name}/model.onnx", providers=["CPUExecutionProvider"])
    script = torch.jit.load(project / f"build/{name}/model.pt")
    return {
        "onnx": session.run(["OUTPUT__0", "OUTPUT__1"], {"INPUT__0": batch}),
        "torchscript": [output.numpy() for output in script(torch.from_numpy(batch))],
    }


@pytest.mark.parametrize(("name", "size"), [
    ("bytes", (16, 16)), ("dynamo", (16, 16)), ("old", (16, 16)), ("sizes", (16, 16)), ("sizes", (32, 24)),
])  # fmt: skip
def test_bytes_go_in_and_the_best_classes_come_out(built: Project, name: str, size: tuple[int, int]) -> None:
    batch = np.random.default_rng(3).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    shares, classes = expected(built, batch)
    for outputs in run(built, name, batch).values():
        assert [output.dtype.name for output in outputs] == ["float32", "int64"]
        np.testing.assert_allclose(outputs[0], shares, rtol=1e-5)
        np.testing.assert_array_equal(outputs[1], classes)


def test_a_client_sends_a_quarter_of_the_bytes(built: Project) -> None:
    sizes = {}
    for name in ("plain", "bytes"):
        (tensor,) = json.loads((built / f"build/{name}/model.onnx.signature.json").read_text())["inputs"]
        sizes[name] = int(np.prod(tensor["shape"][1:])) * np.dtype(tensor["dtype"]).itemsize
    assert sizes["plain"] == 4 * sizes["bytes"]


def test_layers_keep_their_names(built: Project) -> None:
    """The nodes that engine.keep_fp32 and a lock file name exist with both input formats."""
    graphs = {name: onnx.load(built / f"build/{name}/model.onnx").graph for name in ("plain", "bytes")}
    names = {name: {node.name for node in graph.node} for name, graph in graphs.items()}
    assert names["plain"] <= names["bytes"]


def test_engines_take_bytes_too(built: Project) -> None:
    for name in ("bytes", "bf16"):
        signature = json.loads((built / f"build/{name}/model.rtx.signature.json").read_text())
        assert [tensor["dtype"] for tensor in signature["inputs"] + signature["outputs"]] == [
            "uint8",
            "float32",
            "int64",
        ]
    profile = json.loads((built / "build/sizes/model.rtx.signature.json").read_text())["profiles"][0]["INPUT__0"]
    assert profile == {"min": [1, 16, 16, 3], "opt": [3, 16, 16, 3], "max": [3, 32, 24, 3]}


@pytest.mark.parametrize(("output", "body", "message"), [
    ("[output]\ntop_k = 5", "", "output.top_k: 5 of 4 classes"),
    ("[output]\nsoftmax = true", "return x", "of (batch, classes), and the network's is shape [7, 5, 14, 14]"),
])  # fmt: skip
def test_what_has_no_classes_has_no_best_ones(project: Project, output: str, body: str, message: str) -> None:
    add(project, "net", output, body=body, formats='"onnx"')
    result = project.doit()
    assert result.code == 1
    assert message in failure_line(result, "reference:net")


def compare(probabilities: list[Any], classes: list[list[int]]) -> dict[str, metrics.OutputFigures]:
    """The measured figures of six samples, whose top classes are compared with those of a reference."""
    names = [f"{index}.jpg" for index in range(6)]
    values = np.array([[0.6, 0.3], [0.5, 0.4], [0.9, 0.05], [0.7, 0.2], [0.45, 0.449], [0.8, 0.1]])
    reference = {"OUTPUT__0": values, "OUTPUT__1": np.array([[0, 1], [2, 1], [3, 0], [1, 2], [0, 3], [2, 3]])}
    outputs = {"OUTPUT__0": np.array(probabilities), "OUTPUT__1": np.array(classes)}
    artifact, expected = IterationResult(outputs), IterationResult(reference)
    return metrics.compare_outputs(artifact, expected, expected, names, top_k_names=("OUTPUT__0", "OUTPUT__1"))


def test_best_classes_are_judged_by_the_values_that_they_have(tmp_path: Path) -> None:
    """Two classes with nearly equal values may change places. Any other change of a class is a failure."""
    values = [[0.6, 0.3], [0.5, 0.4], [0.9, 0.05], [0.7, 0.2], [0.45, 0.449], [0.8, 0.1]]
    same = [[0, 1], [2, 1], [3, 0], [1, 2], [0, 3], [2, 3]]
    settings = {"gate": [], "precision": "fp16", "format": "graph", "allow_untestable": False, "random_weights": False}
    tie = [*same[:4], [3, 0], same[5]]
    assert not list(gate.failures(compare(values, tie), settings))
    other = [[1, 0], *same[1:]]
    outputs = compare(values, other)
    assert list(outputs) == ["OUTPUT__0"], "the figures of the classes belong to their values"
    (failure,) = gate.failures(outputs, settings)
    assert failure.metric == "top1"
    assert "worst at 0.jpg: class 1 for 0" in failure.message


MODES, FILTERS = ("center", "squash", "border"), ("nearest", "bilinear", "bicubic", "lanczos")


@pytest.mark.parametrize("size", [(224, 224), (160, 240), (600, 600)])
@pytest.mark.parametrize("input_format", ["fp32_nchw", "uint8_nhwc"])
def test_pictures_are_prepared_to_the_bit_as_timm_does(size: tuple[int, int], input_format: str) -> None:
    """With the shipped photographs, smaller and larger than the crop, every crop mode and every interpolation."""
    for mode, interpolation, crop_pct in itertools.product(MODES, FILTERS, (0.7, 0.875, 1.0)):
        config = {
            "input_size": (3, *size), "interpolation": interpolation, "crop_pct": crop_pct, "crop_mode": mode,
            "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
        }  # fmt: skip
        transform = picture_transform.transform(config, input_format)
        settings = json.loads(json.dumps({"format": input_format, **config}))
        for path in PICTURES:
            with Image.open(path) as image:
                expected = transform([image.convert("RGB")]).numpy()
            actual = preprocess(path.read_bytes(), settings)
            assert actual.dtype == expected.dtype
            assert np.array_equal(actual, expected), (path, mode, interpolation, crop_pct)


@pytest.mark.parametrize("picture", [b"", b"GIF89a", PICTURES[0].read_bytes()[:2000], b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_what_is_no_picture_is_a_value_error(picture: bytes) -> None:
    config = {
        "format": "uint8_nhwc",
        "input_size": [3, 8, 8],
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bicubic",
    }
    with pytest.raises(PictureError, match="expected a picture in JPEG or PNG"):
        preprocess(picture, config)


def test_bytes_have_as_many_channels_as_the_network_takes() -> None:
    table = Input(format="uint8_nhwc", shape=[4, 8, 8], mean=[0.5] * 4, std=[0.25] * 4)
    interface = interface_of(Spec(weights=Weights(source="random://0"), input=table))
    batch = torch.full((2, 8, 8, 4), 255, dtype=torch.uint8)
    normalized = normalize_input(torch.nn.Identity(), batch, interface)
    assert normalized.shape == (2, 4, 8, 8)
    assert torch.equal(normalized, torch.full((2, 4, 8, 8), 2.0))
