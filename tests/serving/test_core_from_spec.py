"""Models that doit builds from a spec, whose tensors Triton fills, keeps, labels or gathers: its core answers them.

sums: a ragged batch, from an ONNX file. counter: a state and a control of sequences. free: max_batch_size 0 with an
open dimension, and labels of the second output.
"""

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file

from build_tasks.serving import triton_server
from build_tasks.triton.model_config import protobuf
from tests.serving.test_core_tensors import infer
from tests.support import core_server
from tests.support.project import ROOT, Project, failure_line

SPEC = """\
formats = ["onnx"]
max_batch_size = 8
[weights]
source = "sums.onnx"
[[inputs]]
name = "VALUES"
shape = ["length"]
ragged = true
[[inputs]]
name = "ENDS"
dtype = "int32"
shape = []
[dimensions.length]
max = 5
[[outputs]]
name = "TOTAL"
[[outputs]]
name = "DOUBLE"
[triton.onnx.dynamic_batching]
max_queue_delay_microseconds = 300000
preferred_batch_size = [3]
[[triton.onnx.batch_input]]
kind = "BATCH_ACCUMULATED_ELEMENT_COUNT"
target_name = ["ENDS"]
data_type = "TYPE_INT32"
source_input = ["VALUES"]
[[triton.onnx.batch_output]]
target_name = ["DOUBLE"]
source_input = ["VALUES"]
"""

COUNTER = """\
formats = ["onnx"]
max_batch_size = 4
[architecture]
network = "network.py:build"
[weights]
source = "w.safetensors"
[[inputs]]
name = "X"
shape = [2]
[[inputs]]
name = "START"
dtype = "int32"
shape = [1]
[[inputs]]
name = "OLD"
shape = [2]
[[outputs]]
name = "Y"
[[outputs]]
name = "NEW"
[triton.onnx.sequence_batching]
control_input = [{ name = "START", control = [{ kind = "CONTROL_SEQUENCE_START", int32_false_true = [0, 1] }] }]
[[triton.onnx.sequence_batching.state]]
input_name = "OLD"
output_name = "NEW"
data_type = "TYPE_FP32"
dims = [2]
initial_state = [{ name = "zero", data_type = "TYPE_FP32", dims = [2], zero_data = true }]
"""
FREE = """\
formats = ["onnx"]
max_batch_size = 4
[architecture]
network = "network.py:build"
[weights]
source = "w.safetensors"
[[inputs]]
name = "X"
shape = ["n"]
[dimensions.n]
max = 6
[[outputs]]
name = "total"
[[outputs]]
name = "sign"
labels = "signs.txt"
[triton.onnx]
max_batch_size = 0
"""
NETWORK = """\
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, {arguments}):
        {body}


def build():
    return Network()
"""
# By name of the model: the spec, the arguments of forward, and its body.
NETWORKS = {
    "counter": (COUNTER, "X, START, OLD", "new = (X * self.w + OLD) * (1 + 0 * START); return new + START, new"),
    "free": (FREE, "X", "s = (X * self.w).sum(1); return s[:, None], torch.stack([s, -s], 1)"),
}


def write_sums(path: Path) -> None:
    """VALUES (values), ENDS (batch) -> TOTAL (batch, 1), the sum of each request; DOUBLE (values), each value twice."""
    nodes: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("CumSum", ["VALUES", "zero"], "sums", {}),
        ("Sub", ["ENDS", "one"], "last", {}),
        ("Gather", ["sums", "last"], "upto", {}),
        ("Slice", ["upto", "start", "end"], "before", {}),
        ("Concat", ["nothing", "before"], "shifted", {"axis": 0}),
        ("Sub", ["upto", "shifted"], "total", {}),
        ("Unsqueeze", ["total", "axis"], "TOTAL", {}),
        ("Add", ["VALUES", "VALUES"], "DOUBLE", {}),
    ]
    constants = {
        "zero": np.int32(0), "one": np.int32(1), "axis": np.array([1]), "start": np.array([0]), "end": np.array([-1]),
        "nothing": np.zeros(1, np.float32),
    }  # fmt: skip
    f, i = TensorProto.FLOAT, TensorProto.INT32
    graph = helper.make_graph(
        [helper.make_node(kind, inputs, [output], **more) for kind, inputs, output, more in nodes],
        "sums",
        [helper.make_tensor_value_info("VALUES", f, ["values"]), helper.make_tensor_value_info("ENDS", i, ["batch"])],
        [
            helper.make_tensor_value_info("TOTAL", f, ["batch", 1]),
            helper.make_tensor_value_info("DOUBLE", f, ["values"]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("ragged") / "project")
    write_sums(project.model("sums", SPEC) / "sums.onnx")
    for name, (spec, arguments, body) in NETWORKS.items():
        code = NETWORK.format(arguments=arguments, body=body)
        folder = project.model(name, spec, network_py=code, signs_txt="up\ndown\n")
        save_file({"w": torch.ones(1)}, folder / "w.safetensors")
    project.built()
    return project


@pytest.fixture(scope="module")
def server(project: Project) -> Iterator[triton_server.Server]:
    with core_server.serving(project) as running:
        for name in ("sums_onnx", "counter_onnx", "free_onnx"):
            assert running.load(name) is None
        yield running


def parsed(path: Path) -> Any:
    config = text_format.Parse(path.read_text(), protobuf().ModelConfig())
    config.ClearField("parameters")  # the provenance
    return config


def test_the_config_and_the_files_are_those_of_a_ragged_batch(project: Project) -> None:
    golden = ROOT / "tests/triton/golden/sums_onnx.pbtxt"
    assert parsed(project / "model_repository/sums_onnx/config.pbtxt") == parsed(golden)
    signature = json.loads((project / "build/sums/model.onnx.signature.json").read_text())
    assert {each["name"]: each["shape"] for each in (*signature["inputs"], *signature["outputs"])} == {
        "VALUES": [-1], "ENDS": [-1], "TOTAL": [-1, 1], "DOUBLE": [-1],
    }  # fmt: skip
    measured = json.loads((project / "build/sums/model.onnx.measured.json").read_text())
    assert measured["outputs"].keys() == {"TOTAL", "DOUBLE"}
    assert all(max(output["errors"]) < 1e-5 for output in measured["outputs"].values())


def test_triton_answers_requests_of_several_lengths_in_one_batch(
    project: Project, server: triton_server.Server
) -> None:
    rows = [np.arange(length, dtype=np.float32)[None] + length for length in (3, 1, 5)]
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda row: infer(server, "sums_onnx", {"VALUES": row}), rows))
    assert answers == [{"TOTAL": [[row.sum()]], "DOUBLE": (2 * row).tolist()} for row in rows]
    run = project.built("smoke", f"--url={server.http}", f"--grpc={server.grpc}")
    assert len(re.findall(r"^ (?:sums|free)_onnx .* ok$", run.out, re.MULTILINE)) == 4, run.out
    assert "counter_onnx   HTTP" in re.sub(" +", "   ", run.out)
    assert "skipped: Triton itself fills inputs of the network" in run.out
    client = project / "build/sums/clients/sums_onnx/http_client.py"
    command = [sys.executable, str(client), "--url", server.http]
    assert "ENDS" not in subprocess.run([*command, "--help"], text=True, capture_output=True).stdout
    np.save(project / "batch.npy", np.concatenate([rows[0], rows[0] + 1]))
    sent = subprocess.run([*command, str(project / "batch.npy")], text=True, capture_output=True)
    assert sent.stdout.split("\n")[:2] == ["TOTAL [[12.]", " [15.]]"], sent.stdout + sent.stderr


def test_triton_keeps_the_state_and_fills_the_control_that_the_spec_names(
    project: Project, server: triton_server.Server
) -> None:
    def send(value: float, **flags: Any) -> list[float]:
        answer = infer(server, "counter_onnx", {"X": np.full((1, 2), value, np.float32)}, sequence_id=5, **flags)
        assert answer.keys() == {"Y"}
        return list(answer["Y"][0])

    assert send(1, sequence_start=True) == [2, 2], "1 more at the start"
    assert send(2) == [3, 3]
    assert send(4, sequence_end=True) == [7, 7]
    np.save(project / "x.npy", np.array([[1, 1], [2, 2], [4, 4]], np.float32))
    client = project / "build/counter/clients/counter_onnx/grpc_client.py"
    command = [sys.executable, str(client), "--url", server.grpc, str(project / "x.npy")]
    run = subprocess.run(command, text=True, capture_output=True)
    assert run.stdout.split() == ["Y", "[[2.", "2.]", "[3.", "3.]", "[7.", "7.]]"], run.stdout + run.stderr


def test_clients_form_the_batch_and_get_the_label_of_the_second_output(server: triton_server.Server) -> None:
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    rows = np.array([[1, 2, 3], [-1, -2, -4]], np.float32)
    assert infer(server, "free_onnx", {"X": rows}) == {"total": [[6], [-7]], "sign": [[6, -6], [-7, 7]]}
    x = InferInput("X", [1, 3], "FP32").set_data_from_numpy(rows[1:])
    with contextlib.closing(InferenceServerClient(server.http)) as client:
        answer = client.infer("free_onnx", [x], outputs=[InferRequestedOutput("sign", class_count=1)])
    assert answer.as_numpy("sign").ravel().tolist() == [b"7.000000:1:down"]


WARM_UP = "model_warmup = [{ name = 'w', batch_size = 1, inputs = { X = { data_type = 'TYPE_FP32', dims = [2], "
WRONG = [
    (
        "sums", "BATCH_ACCUMULATED_ELEMENT_COUNT", "BATCH_ELEMENT_COUNT", "onnx:sums",
        "the output TOTAL of a request changes with the others in its batch, of [5], [1], [3]: does the network "
        "cut the values as batch_input in [triton.onnx] counts them?",
    ),
    (
        "sums", '[[triton.onnx.batch_output]]\ntarget_name = ["DOUBLE"]\nsource_input = ["VALUES"]\n', "",
        "weights:sums",
        "expected a row for each, or a batch_output in [triton.onnx] that names it",
    ),
    (
        "counter", "[architecture]", '[[ensemble.steps]]\nmodel = "counter_onnx"\n[architecture]', "ensemble:counter",
        "since the steps are compared without a server; Triton itself fills inputs of counter_onnx",
    ),
    (
        "counter", "[triton.onnx.s", f"[triton.onnx]\n{WARM_UP}zero_data = true }} }} }}]\n[triton.onnx.s",
        "config:counter_onnx",
        "triton.model_warmup[0].inputs: expected the model's inputs, X, START, OLD, found 'X'",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "old", "new", "task", "line"), WRONG)
def test_what_contradicts_the_network_is_refused(
    project: Project, model: str, old: str, new: str, task: str, line: str
) -> None:
    """Of the ragged batch, a network that mixes its requests."""
    spec = project / f"models/{model}/model.toml"
    before = spec.read_text()
    try:
        project.edit(f"models/{model}/model.toml", old, new)
        assert line in failure_line(project.doit(task), task)
    finally:
        spec.write_text(before)


def test_labels_must_be_as_many_as_the_classes_of_their_output(project: Project) -> None:
    labels = project / "models/free/signs.txt"
    labels.write_text("up\n")
    line = "labels: expected one label for each of the 2 classes of sign, found 1 labels"
    assert line in failure_line(project.doit("reference:free"), "reference:free")
    labels.write_text("up\ndown\n")


SAME = re.compile(r"^(\d+) of \1 targets have the same bytes", re.MULTILINE)


@pytest.mark.parametrize("models", [["free"], pytest.param(["sums", "counter"], marks=pytest.mark.long)])
def test_the_same_inputs_give_the_same_bytes(project: Project, models: list[str]) -> None:
    """`doit rebuild` builds them in another folder."""
    project.built(*models)  # tests before have made a stage fail
    run = project.built("rebuild", *models)
    assert SAME.search(run.out), run.out


EDITS = {
    "free": [("max = 6", "max = 5"), ('"total"', '"sum"'), ("max_batch_size = 0", "max_batch_size = 2"), ("4", "3")],
    "sums": [("max = 5", "max = 4"), ("= 300000", "= 100"), ("max_batch_size = 8", "max_batch_size = 4")],
    "counter": [('name = "Y"', 'name = "Z"'), ("[0, 1]", "[1, 0]"), ("max_batch_size = 4", "max_batch_size = 3")],
}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_edits_end_where_a_clean_build_does(project: Project, tmp_path: Path, seed: int) -> None:
    edited, generator = project.copy(tmp_path / "edited"), random.Random(seed)
    for _ in range(6):
        model = generator.choice([*EDITS])
        old, new = generator.choice(EDITS[model])
        spec = edited / f"models/{model}/model.toml"
        text = spec.read_text()
        spec.write_text(text.replace(old, new) if old in text else text.replace(new, old))
        if generator.random() < 0.5:
            edited.built()
    edited.built()
    clean = Project(tmp_path / "clean")
    shutil.rmtree(clean / "models")
    shutil.copytree(edited / "models", clean / "models")
    clean.built()
    assert edited.tree() == clean.tree()
