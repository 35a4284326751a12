"""Ensembles of one's own steps: built, measured end to end, and answered by Triton's core.

IMAGE ─► net_preprocess ─► PIXELS ─┬► net_onnx ─► one ─┬► net_join (Python) ─► BEST, SUM
                                   └► second ──► two ──┘

IMAGE ─► net_ensemble ─┬► BEST
                       └► SUM ─► second_twice (Python, max_batch_size 0) ─► TWICE

TEXT ─► texts_split (Python) ─► WORDS ─► texts_onnx ─► best, one value for each sample ─► texts_report (Python) ─► LABEL
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from build_tasks.serving import triton_server
from build_tasks.verification.ensemble_samples import load_samples
from tests.support import core_server, tiny_network
from tests.support.project import Project, failure_line

STEPS = """
[[ensemble.steps]]
python = "join"
inputs = { A = "one", B = "two" }
[[ensemble.steps]]
model = "net_preprocess"
outputs = { INPUT__0 = "PIXELS" }
[[ensemble.steps]]
model = "net_onnx"
inputs = { INPUT__0 = "PIXELS" }
outputs = { OUTPUT__0 = "one" }
[[ensemble.steps]]
model = "second"
inputs = { INPUT__0 = "PIXELS" }
outputs = { OUTPUT__0 = "two" }
"""
CONFIG = """\
max_batch_size: 2
input { name: "A" data_type: TYPE_FP32 dims: 4 }
input { name: "B" data_type: TYPE_FP32 dims: 4 }
output { name: "BEST" data_type: TYPE_INT64 dims: 2 }
output { name: "SUM" data_type: TYPE_FP32 dims: 4 }
"""
MODEL = """\
import numpy as np
import triton_python_backend_utils as pb_utils
from join import best


class TritonPythonModel:
    def execute(self, requests):
        return [self.respond(request) for request in requests]

    def respond(self, request):
        a, b = (pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in ("A", "B"))
        return pb_utils.InferenceResponse([pb_utils.Tensor("BEST", best(a, b)), pb_utils.Tensor("SUM", a + b)])
"""
OUTER = """
[[ensemble.steps]]
model = "net_ensemble"
[[ensemble.steps]]
python = "twice"
inputs = { X = "SUM" }
outputs = { Y = "TWICE" }
"""
TWICE_CONFIG = """\
max_batch_size: 0
input { name: "X" data_type: TYPE_FP32 dims: [-1, 4] }
output { name: "Y" data_type: TYPE_FP32 dims: [-1, 4] }
"""
TWICE = (
    MODEL.partition("    def respond")[0].replace("from join import best\n", "")
    + """\
    def respond(self, request):
        x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("Y", 2 * x)])
"""
)
JOIN = "import numpy as np\n\n\ndef best(a, b):\n    return np.stack([a.argmax(axis=1), b.argmax(axis=1)], axis=1)\n"


TEXTS = """\
formats = ["onnx"]
max_batch_size = 4
[weights]
source = "counts.onnx"
[[inputs]]
name = "words"
dtype = "string"
shape = ["length"]
values = ["cat", "dog", "cow"]
[dimensions.length]
max = 6
[ensemble]
samples = "samples.npz"
outputs = ["LABEL"]
[[ensemble.steps]]
python = "report"
inputs = { BEST = "best" }
[[ensemble.steps]]
python = "split"
outputs = { WORDS = "words" }
[[ensemble.steps]]
model = "texts_onnx"
"""
SPLIT_CONFIG = """\
max_batch_size: 4
input { name: "TEXT" data_type: TYPE_STRING dims: 1 }
output { name: "WORDS" data_type: TYPE_STRING dims: -1 }
"""
SPLIT = (
    MODEL.partition("    def respond")[0].replace("from join import best\n", "")
    + """\
    def respond(self, request):
        texts = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
        words = np.array([text.decode().split() for text in texts[:, 0]], dtype=object)
        return pb_utils.InferenceResponse([pb_utils.Tensor("WORDS", words)])
"""
)
REPORT_CONFIG = """\
max_batch_size: 4
input { name: "BEST" data_type: TYPE_INT64 dims: 1 }
output { name: "LABEL" data_type: TYPE_STRING dims: 1 }
"""
REPORT = (
    MODEL.partition("    def respond")[0].replace("from join import best\n", "")
    + """\
    def respond(self, request):
        ((best,), *others) = pb_utils.get_input_tensor_by_name(request, "BEST").as_numpy()
        labels = np.array([[f"class {value}"] for value in (best, *(other for (other,) in others))], dtype=object)
        return pb_utils.InferenceResponse([pb_utils.Tensor("LABEL", labels)])
"""
)
LINES = ["cat cat cow", "dog cow dog", "cow cow cow", "dog dog dog", "cat cow cow"]


def save_counts(path: Path) -> None:
    """Write an ONNX file that counts words. The most frequent one is a value without a dimension besides the batch."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node(
            "LabelEncoder", ["words"], ["ids"], domain="ai.onnx.ml", keys_strings=["cat", "dog", "cow"],
            values_int64s=[0, 1, 2], default_int64=3,
        ),
        helper.make_node("Gather", ["table", "ids"], ["ones"]),
        helper.make_node("ReduceSum", ["ones", "axis"], ["counts"], keepdims=0),
        helper.make_node("ArgMax", ["counts"], ["best"], axis=1, keepdims=0),
    ]  # fmt: skip
    words = helper.make_tensor_value_info("words", TensorProto.STRING, ["n", "length"])
    outputs = [
        helper.make_tensor_value_info("counts", TensorProto.FLOAT, ["n", 4]),
        helper.make_tensor_value_info("best", TensorProto.INT64, ["n"]),
    ]
    constants = [
        numpy_helper.from_array(np.eye(4, dtype=np.float32), "table"),
        numpy_helper.from_array(np.array([1]), "axis"),
    ]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 2)]
    graph = helper.make_graph(nodes, "counts", [words], outputs, constants)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)


def add(project: Project, name: str, model_format: str, ensemble: str) -> Path:
    folder = tiny_network.add(project, name, formats=f'"{model_format}"')
    with (folder / "model.toml").open("a") as file:
        file.write(ensemble)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("ensembles") / "project")
    folder = add(project, "net", "onnx", STEPS)
    (folder / "join").mkdir()
    for file, text in {"config.pbtxt": CONFIG, "model.py": MODEL, "join.py": JOIN}.items():
        (folder / "join" / file).write_text(text)
    folder = add(project, "second", "torchscript", OUTER)
    (folder / "twice").mkdir()
    for file, text in {"config.pbtxt": TWICE_CONFIG, "model.py": TWICE}.items():
        (folder / "twice" / file).write_text(text)
    folder = project.model("texts", TEXTS)
    save_counts(folder / "counts.onnx")
    np.savez(folder / "samples.npz", TEXT=np.array([[line] for line in LINES]))
    for name, config, model in (("split", SPLIT_CONFIG, SPLIT), ("report", REPORT_CONFIG, REPORT)):
        (folder / name).mkdir()
        (folder / name / "config.pbtxt").write_text(config)
        (folder / name / "model.py").write_text(model)
    project.built("net", "second", "texts")
    return project


@pytest.fixture(scope="module")
def server(project: Project) -> Iterator[triton_server.Server]:
    with core_server.serving(project) as running:
        yield running


def test_triton_answers_as_the_steps_do_in_pytorch(project: Project, server: triton_server.Server) -> None:
    from polygraphy.comparator import RunResults
    from tritonclient.http import InferenceServerClient, InferInput

    assert server.load("net_ensemble") is None
    samples = load_samples("build/net/model.ensemble.samples.json")["IMAGE"][:2]
    expected = RunResults.load("build/net/model.ensemble.reference.json")[0][1][0]
    image = InferInput("IMAGE", list(samples.shape), "BYTES")
    image.set_data_from_numpy(samples)
    with contextlib.closing(InferenceServerClient(server.http)) as client:
        answer = client.infer("net_ensemble", [image])
    assert np.array_equal(answer.as_numpy("BEST"), expected["BEST"][:2])
    assert np.allclose(answer.as_numpy("SUM"), expected["SUM"][:2], rtol=1e-5, atol=1e-6)
    run = project.built("smoke", f"--url={server.http}", f"--grpc={server.grpc}", "--model", "net_ensemble")
    assert len(re.findall(r"^ net_ensemble .* ok$", run.out, re.MULTILINE)) == 2, run.out
    verdict = project / "build/second/model.pt.verdict.json"
    before = verdict.read_text()
    verdict.write_text(json.dumps(json.loads(before) | {"model": 64 * "0"}))  # a newer build of a step
    run = project.doit("smoke", f"--url={server.http}", f"--grpc={server.grpc}", "--model", "net_ensemble")
    verdict.write_text(before)
    assert "net_ensemble (HTTP): version 1 is build " in run.out


def test_an_ensemble_is_a_step_of_another_beside_a_step_without_a_batch(
    project: Project, server: triton_server.Server
) -> None:
    """Triton hands the whole batch to the step with max_batch_size 0, whose dims begin with -1 or with that batch."""
    config = project / "build/second/model.ensemble.config.pbtxt"
    assert "max_batch_size: 2" in config.read_text(), "the batch of net_join, a step of net_ensemble"
    arguments = f"--url={server.http}", f"--grpc={server.grpc}", "--model", "second_ensemble"
    assert server.load("second_ensemble") is None
    run = project.built("smoke", *arguments)
    assert len(re.findall(r"^ second_ensemble .* ok$", run.out, re.MULTILINE)) == 2, run.out
    bill = json.loads((project / "model_repository/second_ensemble/1/bom.cdx.json").read_text())
    steps = {each["name"] for each in bill["components"]}
    assert {"net_preprocess", "net_onnx", "net_join", "second", "second_twice"} <= steps, steps
    twice = project / "models/second/twice/config.pbtxt"
    twice.write_text(TWICE_CONFIG.replace("-1", "2"))
    project.built("second")
    assert "max_batch_size: 0" in config.read_text()
    assert server.load("second_ensemble") is None
    run = project.built("smoke", *arguments)
    assert len(re.findall(r"^ second_ensemble .* ok$", run.out, re.MULTILINE)) == 2, run.out
    twice.write_text(TWICE_CONFIG)


def test_steps_pass_texts_and_single_values_as_triton_has_them(project: Project, server: triton_server.Server) -> None:
    """Texts are bytes in Python models, and a value for each sample has the dims [1] in which Triton reshapes it."""
    assert server.load("texts_ensemble") is None
    np.savez(project / "texts.npz", TEXT=np.array(LINES[:2]))
    file = "build/texts/clients/texts_ensemble/http_client.py"
    command = [sys.executable, file, "texts.npz", "--url", server.http]
    run = subprocess.run(command, cwd=project.root, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.split("\n")[:2] == ["LABEL [[b'class 0']", " [b'class 1']]"]
    smoke = project.built("smoke", f"--url={server.http}", f"--grpc={server.grpc}", "--model", "texts_ensemble")
    assert len(re.findall(r"^ texts_ensemble .* answers with texts,", smoke.out, re.MULTILINE)) == 2, smoke.out


def test_samples_of_an_ensemble_that_do_not_fit_are_refused(project: Project) -> None:
    samples = project / "models/texts/samples.npz"
    before = samples.read_bytes()
    np.savez(samples, TEXT=np.zeros((4, 2), np.float32))
    run = project.doit("ensemble:texts")
    samples.write_bytes(before)
    expected = "expected for TEXT texts of the shape [samples, 1] (-1: any length), found float32 of the shape [4, 2]"
    assert f"models/texts/model.toml: ensemble.samples: {expected}" in failure_line(run, "ensemble:texts")


def test_an_edit_of_a_step_runs_the_ensemble_again(project: Project) -> None:
    """The networks' own artifacts stay as they are. An edit of another model's spec is noticed, too."""
    assert project.built("net").ran == []
    project.edit("models/net/join/join.py", "a.argmax(axis=1)", "(-a).argmax(axis=1)")
    run = project.built("net")
    changed = {"ensemble:net", "publish:net_ensemble", "publish:net_join", "python_model:net_join"}
    assert set(run.ran) == changed | ({"config:net_ensemble"} & set(run.ran))
    project.edit("models/second/model.toml", "max_batch_size = 3", "max_batch_size = 1")
    assert "config:net_ensemble" in project.built("net").ran
    assert "max_batch_size: 1" in (project / "model_repository/net_ensemble/config.pbtxt").read_text()


def test_steps_that_do_not_fit_publish_nothing(project: Project) -> None:
    project.edit("models/net/join/config.pbtxt", "dims: 4", "dims: 5")
    run = project.doit("net")
    assert run.code == 1
    assert "net_join takes TYPE_FP32 [5], but net_onnx makes TYPE_FP32 [4]" in failure_line(run, "config:net_ensemble")
    assert "publish:net_ensemble" not in run.ran


@pytest.mark.long  # a second build of both models
def test_the_same_inputs_give_the_same_bytes(project: Project) -> None:
    (project / "models/net/join/config.pbtxt").write_text(CONFIG)  # the test before has made it wrong
    project.built("net", "second")
    run = project.built("rebuild", "second")
    assert re.search(r"^(\d+) of \1 targets have the same bytes", run.out, re.MULTILINE), run.out
