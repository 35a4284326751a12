"""Networks with several inputs of any type and open dimensions, from the spec to the artifacts that Triton serves.

All models are built by one doit. Each answer is compared with the network itself, at batches and lengths of its own.
"""

import json
import re
import sys
import types
import warnings
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf import text_format
from onnx import TensorProto, helper
from polygraphy.json import load_json
from safetensors.torch import save_file

from build_tasks.triton.model_config import protobuf
from tests.support.project import Project, Run

SPEC = """\
formats = ["torchscript", "onnx"{more}]
max_batch_size = 4
[architecture]
network = "network.py:build"
[weights]
source = "weights.safetensors"
[engine]
precision = "fp32"
"""
NETWORK = """\
import dataclasses
import torch
from torch import nn

@dataclasses.dataclass
class Answer:
    scores: torch.Tensor
    pooled: torch.Tensor
    loss: object = None

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        {layers}
    def forward(self, {arguments}):
        {body}

def build():
    return Network()
"""
TEXT = """
[[inputs]]
name = "input_ids"
dtype = "int64"
shape = ["length"]
high = 29
[[inputs]]
name = "attention_mask"
dtype = "int64"
shape = ["length"]
values = [1]
[dimensions.length]
min = 2
opt = 6
max = 16
[[engine.profiles]]
dimensions.length = { max = 8 }
[[engine.profiles]]
opt_batch_size = 1
dimensions.length = { min = 7, opt = 12 }
"""
# A sequence with the time first: (time, batch, features).
TIME_FIRST = """
[[inputs]]
name = "frames"
shape = ["time", 6]
batch_dimension = 1
[dimensions.time]
min = 2
opt = 5
max = 9
"""
FRAMES = f"""{TIME_FIRST}
[[outputs]]
key = "out.scores"
name = "scores"
classes = false
batch_dimension = 1
[[outputs]]
key = "out.pooled"
name = "pooled"
"""
VECTOR = """
[[inputs]]
name = "image"
dtype = "uint8"
shape = ["h", "w", 3]
layout = "nhwc"
[[inputs]]
name = "flags"
dtype = "bool"
shape = [3]
[[inputs]]
name = "scale"
shape = []
low = 0.5
high = 2
[dimensions]
h = { min = 8, opt = 12, max = 20 }
w = { min = 8, opt = 16, max = 24 }
"""
TWO = "[[inputs]]\nname = {}\nshape = [4]\n[[inputs]]\nname = {}\nshape = [4]\n"
# A detector with four outputs, of which one is an integer; samples of sound.
DETECTOR = """
[[inputs]]
name = "image"
shape = [3, 16, 16]
layout = "nchw"
[[outputs]]
name = "count"
[[outputs]]
name = "boxes"
[[outputs]]
name = "scores"
[[outputs]]
name = "best"
"""
AUDIO = """
[[inputs]]
name = "audio"
shape = ["samples"]
low = -1
high = 1
[dimensions.samples]
min = 40
opt = 64
max = 160
"""
# name: formats besides TorchScript and ONNX, further tables, layers, arguments of forward, body
MODELS = {
    "text": (
        ', "rtx"',
        TEXT,
        "self.e = nn.Embedding(30, 8); self.h = nn.Linear(8, 3)",
        "attention_mask, input_ids, past=None",
        "x = self.e(input_ids) * attention_mask[..., None]; "
        "return {'states': x, 'logits': self.h(x.sum(1)), 'past': past}",
    ),
    "frames": (
        "",
        FRAMES,
        "self.c = nn.Conv1d(6, 5, 3, padding=1)",
        "x",
        "y = self.c(x.permute(1, 2, 0)).permute(2, 0, 1); return {'out': Answer(y, y.mean(0)), 'cache': object()}",
    ),
    "vector": (
        "",
        VECTOR,
        "self.c = nn.Conv2d(3, 5, 3, padding=1); self.h = nn.Linear(8, 4)",
        "image, flags, scale",
        "y = self.c(image.float().permute(0, 3, 1, 2) / 255); "
        "return self.h(torch.cat([y.mean((2, 3)), flags.float()], 1)) * scale[:, None], y",
    ),
    "detector": (
        ', "rtx"',
        DETECTOR,
        "self.c = nn.Conv2d(3, 8, 4, stride=4); self.b = nn.Conv2d(8, 4, 1); self.s = nn.Conv2d(8, 5, 1)",
        "image",
        "x = self.c(image).relu(); scores = self.s(x).flatten(2).transpose(1, 2).softmax(-1); best = scores.amax(-1); "
        "return {'boxes': self.b(x).flatten(2).transpose(1, 2).sigmoid(), 'scores': scores, 'best': best, "
        "'count': (best > 0.25).sum(1, keepdim=True).int()}",
    ),
    "segmenter": (
        "",
        "[input]\nshape = [3, 16, 16]\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]\n",
        "self.c = nn.Conv2d(3, 8, 3, stride=2, padding=1); self.o = nn.Conv2d(8, 5, 1); self.a = nn.Conv2d(8, 5, 1)",
        "x",
        "f = self.c(x).relu(); up = nn.functional.interpolate; return {key: up(layer(f), size=x.shape[-2:], "
        "mode='bilinear', align_corners=False) for key, layer in (('out', self.o), ('aux', self.a))}",
    ),
    "audio": (
        ', "rtx"',
        AUDIO,
        "self.h = nn.Linear(32, 6)",
        "audio",
        "frames = nn.functional.pad(audio, (16, 16)).unfold(1, 32, 8); "
        "frames = frames - frames.mean(-1, keepdim=True); return {'pitch': self.h(frames).sigmoid()}",
    ),
    "swapped": ("", TWO.format('"right"', '"left"'), "self.a = nn.Linear(4, 5)", "left, right",
                "return self.a(left) - 2 * self.a(right)"),
}  # fmt: skip
REFUSED = {
    "misspelt": (
        TWO.format('"left"', '"rihgt"'),
        "inputs: there is no argument 'rihgt' (did you mean 'right'?): forward takes (left, right), and the spec gives "
        "left float32[batch, 4], rihgt float32[batch, 4]",
    ),
    "too_few": (
        '[[inputs]]\nname = "left"\nshape = [4]\n',
        "inputs: missing a required argument: 'right': forward takes (left, right), and the spec gives left "
        "float32[batch, 4]; describe every input in [[inputs]]",
    ),
    "one_picture": (
        "[input]\nshape = [3, 8, 8]\n",
        "inputs: missing a required argument: 'right': forward takes (left, right), and the spec gives INPUT__0 "
        "float32[batch, 3, 8, 8]; describe every input in [[inputs]]",
    ),
    "no_key": (
        TWO.format('"left"', '"right"') + '[[outputs]]\nkey = "logits"\n',
        "outputs[0].key: expected one of 0, which the network answers with, found 'logits'",
    ),
}
GRAPH = """
formats = ["onnx", "rtx"]
max_batch_size = 4
[weights]
source = "two.onnx"
[engine]
precision = "fp32"
[[inputs]]
name = "scale"
dtype = "float16"
shape = [1]
[[inputs]]
name = "ids:0"
dtype = "int64"
shape = ["length"]
high = 9
[dimensions.length]
max = 12
[[outputs]]
key = "hidden.1"
name = "hidden"
"""
# Files of a recogniser with the time first: (time, batch, features) -> scores (time, batch, classes), pooled.
RECOGNISER = f"""
formats = {{formats}}
max_batch_size = 4
[weights]
source = "{{file}}"
{TIME_FIRST}
[[outputs]]
key = 0
name = "scores"
batch_dimension = 1
[[outputs]]
key = 1
name = "pooled"
"""
# Names that no argument of Python can have, for formats that have no arguments.
SEARCH = """\
formats = ["onnx"]
max_batch_size = 4
[architecture]
network = "network.py:build"
[weights]
source = "random://0"
[[inputs]]
name = "query.ids"
dtype = "int64"
shape = ["query"]
high = 9
[[inputs]]
name = "page/ids:0"
dtype = "int64"
shape = ["page"]
high = 9
[dimensions]
query = { max = 6 }
page = { max = 6 }
[[outputs]]
key = "late interaction"
"""
SEARCH_NETWORK = """\
from torch import nn

class Search(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, query, page):
        return {"late interaction": (self.table(query) @ self.table(page).transpose(1, 2)).max(2).values.sum(1)}

def build():
    return Search()
"""
FILES = {"script": "net.pt", "exported": "net.pt2", "graphed": "net.onnx"}
WEIGHTS = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)


def two_inputs() -> onnx.ModelProto:
    """The rows of WEIGHTS that ids:0 names, times `scale` in FP16, and the rows alone."""
    inputs = [
        helper.make_tensor_value_info("ids:0", TensorProto.INT64, ["n", "length"]),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT16, ["n", 1]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("logits", "hidden.1")]
    nodes = [
        helper.make_node("Gather", ["w", "ids:0"], ["hidden.1"]),
        helper.make_node("ReduceMean", ["hidden.1"], ["mean"], axes=[1], keepdims=0),
        helper.make_node("Cast", ["scale"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["mean", "wide"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [onnx.numpy_helper.from_array(WEIGHTS, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


class Recogniser(torch.nn.Module):
    """Its answer depends on the order of the frames of a sequence, and on no other sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c = torch.nn.Conv1d(6, 5, 3, padding=1)

    def forward(self, frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.c(frames.permute(1, 2, 0)).permute(2, 0, 1)
        return scores, scores.cumsum(0)[-1]


def add_recognisers(project: Project) -> None:
    """Add a model for each kind of file that contains the network."""
    frames, module = torch.randn(5, 2, 6), Recogniser().eval()
    dims = {0: torch.export.Dim("time", min=2, max=9), 1: torch.export.Dim("batch", min=1, max=64)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        for name, file in FILES.items():
            formats = '["onnx"]' if name == "graphed" else '["torchscript", "onnx"]'
            path = project.model(name, RECOGNISER.format(formats=formats, file=file)) / file
            if name == "script":
                torch.jit.script(module).save(path)
            elif name == "exported":
                torch.export.save(torch.export.export(module, (frames,), dynamic_shapes=(dims,)), path)
            else:
                axes = {"frames": {0: "t", 1: "n"}, "scores": {0: "t", 1: "n"}, "pooled": {0: "n"}}
                outputs = ["scores", "pooled"]
                torch.onnx.export(
                    module, (frames,), path, dynamo=False, dynamic_axes=axes,
                    input_names=["frames"], output_names=outputs,
                )  # fmt: skip


def add(project: Project, name: str, more: str, tables: str, layers: str, arguments: str, body: str) -> None:
    code = NETWORK.format(layers=layers, arguments=arguments, body=body)
    folder = project.model(name, SPEC.format(more=more) + tables, network_py=code)
    save_file(network(code).state_dict(), folder / "weights.safetensors")


def network(code: str) -> Any:
    module = types.ModuleType("network_of_test")
    sys.modules["network_of_test"] = module  # dataclasses search for their module there
    exec(code, module.__dict__)
    torch.manual_seed(0)
    return module.build().eval()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Run]:
    project = Project(tmp_path_factory.mktemp("tensors"))
    for name, rows in MODELS.items():
        add(project, name, *rows)
    for name, (tables, _) in REFUSED.items():
        add(project, name, "", tables, "self.a = nn.Linear(4, 5)", "left, right", "return self.a(left) + right.sum()")
    onnx.save(two_inputs(), project.model("graph", GRAPH) / "two.onnx")
    add_recognisers(project)
    project.model("search", SEARCH, network_py=SEARCH_NETWORK)
    return project, project.doit("-n", "2")


def config(project: Project, name: str) -> Any:
    return text_format.Parse((project / f"model_repository/{name}/config.pbtxt").read_text(), protobuf().ModelConfig())


def feeds(name: str, batch: int, length: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(batch * length)
    if name == "text":
        ids = random.integers(0, 30, (batch, length))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if name == "frames":
        return {"frames": random.standard_normal((batch, length, 6)).astype(np.float32)}
    if name in ("detector", "segmenter"):
        pixels = random.standard_normal((batch, 3, 16, 16)).astype(np.float32)
        return {"image" if name == "detector" else "INPUT__0": pixels}
    if name == "audio":
        return {"audio": random.uniform(-1, 1, (batch, 16 * length + 9)).astype(np.float32)}
    if name == "vector":
        image = random.integers(0, 256, (batch, 8 + length, 24 - length, 3)).astype(np.uint8)
        scale = random.random(batch).astype(np.float32)
        return {"image": image, "flags": random.random((batch, 3)) < 0.5, "scale": scale}
    return {key: random.standard_normal((batch, 4)).astype(np.float32) for key in ("right", "left")}


def expected(name: str, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The answer of the network itself, by its own names and dimensions."""
    _, _, *code = MODELS[name]
    module = network(NETWORK.format(**dict(zip(("layers", "arguments", "body"), code, strict=True))))
    tensors = {key: torch.from_numpy(array) for key, array in feed.items()}
    with torch.no_grad():
        if name == "frames":
            out = module(tensors["frames"].transpose(0, 1))["out"]
            return [out.scores.transpose(0, 1).numpy(), out.pooled.numpy()]
        answer = module(*tensors.values()) if name == "segmenter" else module(**tensors)
        if name == "detector":  # the spec has another order
            answer = [answer[key] for key in NAMES[name]]
    values = answer.values() if isinstance(answer, dict) else [answer] if torch.is_tensor(answer) else answer
    return [value.numpy() for value in values if value is not None]


NAMES = {
    "text": ["states", "logits"],
    "frames": ["scores", "pooled"],
    "vector": ["OUTPUT__0", "OUTPUT__1"],
    "detector": ["count", "boxes", "scores", "best"],
    "segmenter": ["out", "aux"],
    "audio": ["pitch"],
    "swapped": ["OUTPUT__0"],
}


@pytest.mark.parametrize("name", MODELS)
def test_every_format_answers_as_the_network_by_the_names_of_the_spec(built: tuple[Project, Run], name: str) -> None:
    project, run = built
    module = torch.jit.load(project / f"model_repository/{name}/1/model.pt")
    session = onnxruntime.InferenceSession(project / f"model_repository/{name}_onnx/1/model.onnx")
    inputs = [*feeds(name, 1, 3)]
    for served in (name, f"{name}_onnx"):
        assert [tensor.name for tensor in config(project, served).input] == inputs
        assert [tensor.name for tensor in config(project, served).output] == NAMES[name]
    arguments = [argument.name for argument in module.forward.schema.arguments[1:]]
    assert arguments == (["x"] if name == "segmenter" else inputs), "[input] is found by its place"
    assert [tensor.name for tensor in session.get_outputs()] == NAMES[name], run.out
    for batch, length in ((1, 2), (3, 7), (4, 9)):
        feed = feeds(name, batch, length)
        traced = module(*(torch.from_numpy(array) for array in feed.values()))
        traced = [traced] if torch.is_tensor(traced) else traced
        exported = session.run(None, feed)
        for found, other, answer in zip(traced, exported, expected(name, feed), strict=True):
            np.testing.assert_allclose(found.numpy(), answer, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(other, answer, rtol=1e-4, atol=1e-5)


def test_dims_types_and_warm_ups_are_those_of_the_spec(built: tuple[Project, Run]) -> None:
    project, _ = built
    name_of = protobuf().DataType.Name
    found = config(project, "vector_onnx")
    assert [(t.name, name_of(t.data_type), list(t.dims), t.format, t.HasField("reshape")) for t in found.input] == [
        ("image", "TYPE_UINT8", [-1, -1, 3], 1, False),
        ("flags", "TYPE_BOOL", [3], 0, False),
        ("scale", "TYPE_FP32", [1], 0, True),
    ]
    assert list(found.model_warmup[0].inputs["image"].dims) == [12, 16, 3]
    graph = onnx.load(project / "build/text/model.onnx").graph
    dims = {t.name: [d.dim_param or d.dim_value for d in t.type.tensor_type.shape.dim] for t in graph.input}
    assert dims == {"input_ids": ["batch", "length"], "attention_mask": ["batch", "length"]}
    (states, _) = graph.output
    assert [d.dim_param or d.dim_value for d in states.type.tensor_type.shape.dim] == ["batch", "length", 8]
    assert json.loads((project / "build/text/model.rtx.signature.json").read_text())["profiles"] == [
        {key: {"min": [1, 2], "opt": [4, 6], "max": [4, 8]} for key in ("input_ids", "attention_mask")},
        {key: {"min": [1, 7], "opt": [1, 12], "max": [4, 16]} for key in ("input_ids", "attention_mask")},
    ]
    lengths = {group["input_ids"].shape[1] for group in load_json(str(project / "build/text/samples.json"))}
    assert lengths >= {2, 6, 8, 7, 12, 16}, "every profile is run at its smallest, tuned and largest lengths"


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_the_time_first_is_served_with_the_batch_first(built: tuple[Project, Run], name: str) -> None:
    project, run = built
    assert config(project, f"{name}_onnx").max_batch_size == 4, run.out
    session = onnxruntime.InferenceSession(project / f"model_repository/{name}_onnx/1/model.onnx")
    for batch, length in ((1, 2), (3, 5), (4, 9)):
        feed = feeds("frames", batch, length)
        scores, pooled = Recogniser().eval()(torch.from_numpy(feed["frames"]).transpose(0, 1))
        answers = [session.run(None, feed)]
        if name != "graphed":
            module = torch.jit.load(project / f"model_repository/{name}/1/model.pt")
            answers.append([each.numpy() for each in module(torch.from_numpy(feed["frames"]))])
        for found in answers:
            np.testing.assert_allclose(found[0], scores.detach().transpose(0, 1).numpy(), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found[1], pooled.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_warm_up_requests_hold_valid_values_where_zeros_are_not(built: tuple[Project, Run]) -> None:
    """A mask of `values = [1]` is never zero. Triton reads such values from a file, one sample for the whole batch."""
    project, _ = built
    for name in ("text", "text_onnx"):
        for sample in config(project, name).model_warmup:
            mask, ids = sample.inputs["attention_mask"], sample.inputs["input_ids"]
            assert (mask.input_data_file, ids.zero_data) == ("attention_mask.6.bin", True)
        written = np.fromfile(project / f"model_repository/{name}/warmup/attention_mask.6.bin", np.int64)
        np.testing.assert_array_equal(written, np.ones(6))
    assert not (project / "model_repository/frames/warmup").exists()


def test_an_onnx_file_with_several_inputs_is_served_by_the_names_of_the_spec(built: tuple[Project, Run]) -> None:
    project, run = built
    found = config(project, "graph_onnx")
    assert [tensor.name for tensor in (*found.input, *found.output)] == ["scale", "ids:0", "hidden"], run.out
    session = onnxruntime.InferenceSession(project / "model_repository/graph_onnx/1/model.onnx")
    ids = np.random.default_rng(0).integers(0, 10, (3, 7))
    (answer,) = session.run(None, {"scale": np.ones((3, 1), np.float16), "ids:0": ids})
    np.testing.assert_array_equal(answer, WEIGHTS[ids])
    assert (project / "build/graph/model.rtx").exists()


def test_names_that_no_argument_can_have_are_those_of_onnx(built: tuple[Project, Run]) -> None:
    project, run = built
    found = config(project, "search_onnx")
    names = [tensor.name for tensor in (*found.input, *found.output)]
    assert names == ["query.ids", "page/ids:0", "late_interaction"], run.out
    session = onnxruntime.InferenceSession(project / "model_repository/search_onnx/1/model.onnx")
    feed = {"query.ids": np.ones((3, 2), np.int64), "page/ids:0": np.ones((3, 5), np.int64)}
    assert session.run(None, feed)[0].shape == (3,)


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_that_forward_does_not_take_are_one_line(built: tuple[Project, Run], name: str) -> None:
    _, run = built
    assert f"reference:{name}" in run.failed
    assert f"✗ reference    {name}" in run.out
    assert REFUSED[name][1] in run.out
    assert "Traceback" not in run.out


def tasks(name: str, *stages: str) -> set[str]:
    return {f"{stage}:{model}" for stage in stages for model in (name, f"{name}_onnx")}


STAR = [  # model, line of its spec, another one, and the stages that run because of it besides those of every artifact
    ("frames", 'name = "frames"', 'name = "sound"', ("config",)),
    ("frames", "batch_dimension = 1\n[dimensions", "batch_dimension = 0\n[dimensions", ()),
    ("frames", "min = 2", "min = 3", ()),
    ("frames", "opt = 5", "opt = 4", ("config",)),
    ("frames", "max = 9", "max = 8", ()),
    ("frames", 'key = "out.pooled"', "key = 1", ()),
    ("frames", 'name = "pooled"', 'name = "mean"', ()),
    ("frames", "classes = false", "classes = true", ("measure", "client")),
    ("vector", 'layout = "nhwc"\n', "", ("config",)),
    ("vector", "low = 0.5", "low = 0.25", ("config",)),  # warm-up holds this value
    ("vector", "high = 2", "high = 3", ()),
    ("vector", 'dtype = "bool"', 'dtype = "uint8"', ()),
    ("vector", "shape = [3]", "shape = [4]", ()),
]


@pytest.mark.parametrize(("name", "line", "other", "more"), STAR, ids=[f"{row[0]}: {row[2]}" for row in STAR])
def test_a_changed_key_runs_the_stages_that_read_it(
    built: tuple[Project, Run], name: str, line: str, other: str, more: tuple[str, ...]
) -> None:
    """As `doit plan` foresees it. What follows from another artifact may run, too."""
    project, _ = built
    path = f"models/{name}/model.toml"
    before = (project / path).read_text()
    project.edit(path, line, other)
    found = project.plan(name)["to run"]
    (project / path).write_text(before)
    artifacts = {f"{stage}:{name}" for stage in ("reference", "torchscript", "onnx")}
    assert set(found) == artifacts | tasks(name, "publish", *more)


@pytest.mark.long  # a second build of all formats
def test_the_same_inputs_give_the_same_bytes(built: tuple[Project, Run]) -> None:
    project, _ = built
    run = project.built("rebuild", "text", "frames", "vector", "graph")
    assert re.search(r"^(\d+) of \1 targets have the same bytes", run.out, re.MULTILINE), run.out
