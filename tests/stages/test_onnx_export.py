"""The export to ONNX: the opset `auto`, a fixed opset, attention, and networks that cannot be traced."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from build_tasks.formats.onnx_export import root_cause
from build_tasks.formats.onnx_files import close_dimensions
from tests.support.project import Project, failure_line

SPEC = """\
max_batch_size = 3
formats = [{formats}]

[architecture]
network = "network.py:build"

[input]
shape = [3, 16, 16]

[weights]
source = "random://1"

[onnx]
{onnx}

[accuracy]
allow_untestable = true
{more}
"""
NETWORK = """\
import torch
from torch import nn
from torch.nn import functional


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 4)
        {init}

    def forward(self, x):
        images = self.conv(x)
        features = images.mean(dim=(2, 3))
        words = images.flatten(2).transpose(1, 2)
        {body}


def build():
    return Network(){suffix}
"""
ATTENTION = "self.attention = nn.MultiheadAttention(8, 2, batch_first=True)"
ENCODER = "self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)"


def add(
    project: Project,
    body: str,
    *,
    init: str = "pass",
    suffix: str = "",
    onnx: str = "",
    formats: str = '"torchscript", "onnx"',
    more: str = "",
) -> Path:
    """Add a model with its own network; `body` is the end of its forward()."""
    network = NETWORK.replace("{body}", body).replace("{init}", init).replace("{suffix}", suffix)
    return project.model("own", SPEC.format(onnx=onnx, formats=formats, more=more), network_py=network)


def exported(project: Project) -> tuple[str, int, int]:
    """The exporter, the opset and the IR version of the graph."""
    record = json.loads((project / "build/own/model.onnx.export.json").read_text())
    return record["exporter"], record["opset"], record["ir_version"]


def assert_runs(project: Project) -> None:
    session = onnxruntime.InferenceSession(str(project / "model_repository/own_onnx/1/model.onnx"))
    for batch in (1, 2, 5):
        (answer, *_) = session.run(None, {"INPUT__0": np.zeros((batch, 3, 16, 16), np.float32)})
        assert answer.shape == (batch, 4)


AUTO = {
    "an ordinary network": ("return self.head(features)", "pass", "torchscript", 17),
    "multi-head attention": (
        "return self.head(self.attention(words, words, words, need_weights=False)[0].mean(1))",
        ATTENTION, "dynamo", 18,
    ),
    "a transformer's encoder": ("return self.head(self.encoder(words).mean(1))", ENCODER, "dynamo", 18),
    "an operator that has an opset of its own": (
        "return self.head(functional.fold(functional.unfold(images, 2, stride=2), 14, 2, stride=2).mean((2, 3)))",
        "pass", "torchscript", 18,
    ),
    "an operator that only the dynamo exporter knows, after a mean": (
        "return self.head(self.norm(features))", "self.norm = nn.RMSNorm(8)", "dynamo", 18,
    ),
    "a list, and an operator that only the dynamo exporter knows": (
        "y = torch.sinc(self.head(features)); return [y, 2 * y]", "pass", "dynamo", 18,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", AUTO)
def test_opset_auto_is_17_or_the_next_one_that_the_exporter_writes(project: Project, case: str) -> None:
    body, init, exporter, opset = AUTO[case]
    add(project, body, init=init, formats='"onnx"' if "list" in case else '"torchscript", "onnx"')
    project.built()
    assert exported(project) == (exporter, opset, 8)
    assert_runs(project)


def test_opset_auto_is_one_that_the_release_reads(project: Project) -> None:
    """The TorchScript exporter needs opset 20 for affine_grid, and ONNX Runtime of 23.10 reads 19, and IR version 9."""
    grid = "functional.affine_grid(torch.eye(2, 3).expand(images.shape[0], -1, -1), [images.shape[0], 8, 4, 4])"
    body = f"return self.head(functional.grid_sample(images, {grid}).mean((2, 3)))"
    folder = add(project, body, formats='"onnx"')
    project.built("onnx:own")
    assert exported(project)[:2] == ("torchscript", 20)
    spec = (folder / "model.toml").read_text()
    (folder / "model.toml").write_text(f'{spec}\n[triton]\nrelease = "23.10"\n')
    project.built()
    assert exported(project) == ("dynamo", 18, 8)
    assert_runs(project)


@pytest.mark.parametrize(
    ("body", "opset", "needed"),
    [
        ("return self.head(torch.sinc(features))", 17, 18),
        ("return self.head(functional.fold(functional.unfold(images, 2), 14, 2).mean((2, 3)))", 11, 18),
        ("return self.head(self.attention(words, words, words, need_weights=False)[0].mean(1))", 8, 18),
    ],
)
def test_a_fixed_opset_that_cannot_be_met_says_which_would_do(
    project: Project, body: str, opset: int, needed: int
) -> None:
    add(project, body, init=ATTENTION, onnx=f"opset = {opset}", formats='"onnx"')
    run = project.doit("onnx:own")
    assert run.failed == ["onnx:own"]
    line = failure_line(run, "onnx:own")
    assert line.endswith(f"; onnx.opset = {needed} would do")
    assert "Traceback" not in run.out
    project.edit("models/own/model.toml", f"opset = {opset}", f"opset = {needed}")
    project.built("onnx:own")


UNTRACEABLE = {
    "autograd.Function": "return self.head(Swish.apply(features))",
    "torch.cond": "return self.head(torch.cond(self.head.bias[0] > 0, lambda y: -y, lambda y: 2 * y, (features,)))",
    "a Python loop over values": "return self.head(torch.stack([row * float(row.max() > 0) for row in features]))",
}


@pytest.mark.parametrize("case", ["autograd.Function", "torch.cond"])
def test_a_network_that_cannot_be_traced_is_served_as_onnx_alone(project: Project, case: str) -> None:
    add(project, UNTRACEABLE[case], formats='"onnx"')
    run = project.built()
    assert "torchscript:own" not in run.ran
    assert "torchscript:own" not in project.built("list", "--all").out
    assert exported(project) == ("dynamo", 18, 8)
    assert "because torchscript has no trace: torch.jit.trace refuses the network: " in run.out
    assert "Traceback" not in run.out
    assert_runs(project)


def test_without_torchscript_the_graph_is_the_same(project: Project) -> None:
    add(project, "return self.head(features)")
    project.built("onnx:own")
    graph = onnx.load(project / "build/own/model.onnx")
    project.edit("models/own/model.toml", '"torchscript", "onnx"', '"onnx"')
    assert project.built("onnx:own").ran == ["onnx:own"]
    assert onnx.load(project / "build/own/model.onnx") == graph


REFUSED: dict[str, tuple[str, str, str, str]] = {
    "autograd.Function": (
        UNTRACEABLE["autograd.Function"], "", "torchscript:own",
        "Could not export Python function call 'Swish'; formats = [\"onnx\"] serves it if the dynamo exporter can",
    ),
    "torch.cond": (UNTRACEABLE["torch.cond"], "", "torchscript:own", "torch.jit.trace refuses the network: Detected"),
    "half": (
        "return self.head(features)", ".half()", "weights:own",
        "models/own/network.py:build: expected a network in float32, found float16: leave out .half()",
    ),
    "bfloat16": (
        "return self.head(features)", ".bfloat16()", "weights:own", "expected a network in float32, found bfloat16",
    ),
    "double": (
        "return self.head(features)", ".double()", "weights:own", "expected a network in float32, found float64",
    ),
    "control flow": (
        "return self.head(features if x.mean() > 0 else -features)", "", "torchscript:own",
        "the trace differs from the network",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_torchscript_cannot_hold_is_one_line(project: Project, case: str) -> None:
    body, suffix, task, message = REFUSED[case]
    add(project, body, suffix=suffix)
    run = project.doit(task)
    assert task in run.failed
    assert message in failure_line(run, task)
    assert len(failure_line(run, task)) < 400
    assert "Traceback" not in run.out


@pytest.mark.parametrize("task", ["reference:own", "torchscript:own", "onnx:own", "aoti:own"])
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return self.head(images.flatten(1))", "RuntimeError: mat1 and mat2 shapes cannot be multiplied ("),
        ("raise ValueError(f'16 pixels, not {x.shape[-1]}')", "ValueError: 16 pixels, not 16"),
        ("assert not x.shape[-1]", "AssertionError"),
    ],
)
def test_an_error_of_the_network_is_one_line_with_its_place_and_input(
    project: Project, body: str, reason: str, task: str
) -> None:
    formats = {"onnx:own": '"onnx"', "aoti:own": '"onnx", "aoti"'}
    add(project, body, formats=formats.get(task, '"torchscript", "onnx"'))
    place = NETWORK.partition("{body}")[0].count("\n") + 1
    run = project.doit(task)
    assert run.code == 1, run.out
    line = failure_line(run, task)
    assert f"models/own/network.py, line {place}: the network does not run on float32[" in line
    assert f", 3, 16, 16]: {reason}" in line
    assert "  | " not in run.out


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return self.head(features if x.mean() > 0 else -features)", "Could not guard on data-dependent expression"),
        (
            "for _ in range(int(features.max() * 99)): features = 2 * features\n        return self.head(features)",
            "data-dependent",
        ),
        ("return torch.linalg.inv(features[:, :4].reshape(-1, 2, 2) + 9 * torch.eye(2))", "aten.linalg_inv"),
    ],
)
def test_what_no_exporter_can_write_is_one_line_about_both(project: Project, body: str, reason: str) -> None:
    add(project, body, formats='"onnx"')
    run = project.doit("onnx:own")
    line = failure_line(run, "onnx:own")
    assert "the torchscript exporter " in line
    assert "the dynamo exporter failed: " in line
    assert reason in (project / "build/own/logs/onnx.own.log").read_text()
    assert "Traceback" not in line


OPEN = {
    "F.interpolate to a fixed size": ("return functional.interpolate(images, size=(9, 11)).softmax(1)", [8, 9, 11]),
    "F.interpolate to the input's size": (
        "return functional.interpolate(images, size=x.shape[-2:], mode='bilinear')",
        [8, 16, 16],
    ),
}


@pytest.mark.parametrize(("body", "dims"), OPEN.values(), ids=OPEN)
def test_the_answers_decide_the_dims_of_an_output(project: Project, body: str, dims: list[int]) -> None:
    add(project, body, onnx='exporter = "torchscript"', formats='"onnx"')
    project.built("publish:own_onnx")
    path = project / "build/own/model.onnx"
    session = onnxruntime.InferenceSession(str(path))
    (output,) = session.get_outputs()
    assert output.shape[1:] == dims
    for batch in (1, 5):
        assert session.run(None, {"INPUT__0": np.zeros((batch, 3, 16, 16), np.float32)})[0].shape == (batch, *dims)
    signature = json.loads((project / "build/own/model.onnx.signature.json").read_text())
    assert signature["outputs"][0]["shape"] == [-1, *dims]


def test_a_dim_that_differs_or_depends_on_an_open_size_or_on_values_stays_open() -> None:
    def declared(sizes: list[str | int], answers: list[tuple[int, ...]], more: str = "") -> list[str | int]:
        graph = onnx.parser.parse_model(
            '<ir_version: 8, opset_import: ["": 17]>'
            f"g (float[b, 3, {', '.join(map(str, sizes))}] x) => (float[b, c, h, w] y) {{ y = Relu(x) {more} }}"
        )
        close_dimensions(graph, [[shape] for shape in answers])
        return [d.dim_value or d.dim_param for d in graph.graph.output[0].type.tensor_type.shape.dim]

    assert declared([4, 4], [(1, 3, 4, 4), (2, 3, 4, 4)]) == ["b", 3, 4, 4]
    assert declared([4, 4], [(1, 3, 4, 1), (2, 3, 4, 2)]) == ["b", 3, 4, "w"]
    assert declared(["i", 4], [(1, 3, 4, 4), (2, 3, 4, 4)]) == ["b", "c", "h", "w"]
    assert declared([4, 4], [(2, 3, 4, 4), (2, 3, 4, 4)]) == ["b", 3, 4, 4], "the batch is never closed"
    assert declared([4, 4], [(1, 3, 4, 4), (2, 3, 4, 4)], "z = NonZero(x)") == ["b", "c", "h", "w"]


def test_the_reason_of_an_exporter_is_without_the_node_of_its_graph() -> None:
    """The whole error of PyTorch 2.14 for a transpose, as torch.onnx.errors.SymbolicValueError formats it."""
    text = (
        "Unsupported: ONNX export of transpose for tensor of unknown rank.  [Caused by the value '104 defined in "
        "(%104 : FloatTensor(device=cpu) = onnx::Unsqueeze(%102, %103), scope: net.Net:: # net.py:29:10\n)' "
        "(type 'Tensor') in the TorchScript graph."
    )
    reason = "Unsupported: ONNX export of transpose for tensor of unknown rank."
    assert root_cause(RuntimeError(text)) == reason
