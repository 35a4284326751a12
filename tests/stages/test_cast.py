"""The cast of model.pt to the precision that PyTorch serves: gate, clients, memory format and messages."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build_tasks.formats import torchscript_graph
from tests.support.project import TINY, VERSION_RECORDS, Project, failure_line

SPEC = TINY.replace(', "onnx"', "").replace('labels = "labels.txt"\n', "").replace("= 4", "= 3")
SHAPE = "[input]\nshape = [3, 64, 64]\n"
HALF = '[torchscript]\nprecision = "fp16"\n'

MODELS = {
    "plain": SHAPE,
    "last": SHAPE + '[torchscript]\nmemory_format = "channels_last"\n',
    "on_gpu": SHAPE + '[triton]\ndevice = "gpu"\n',
    "open": (
        f"{SHAPE}min_size = [64, 64]\nmax_size = [96, 64]\n"
        '[torchscript]\nprecision = "bf16"\nmemory_format = "contiguous"\n'
    ),
    "from_bytes": f'{SHAPE}format = "uint8_nhwc"\n[output]\nsoftmax = true\ntop_k = 3\n{HALF}',
}

# A network that converts to fp32 itself, by the number of the type, in a function of its own.
NETWORK = """\
import torch
from torch import nn


@torch.jit.script
def scaled(x: torch.Tensor, times: int) -> torch.Tensor:
    for _ in range(times):
        x = x.to(torch.float32) * torch.ones(x.shape, dtype=torch.float32)
    return x


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        mean = scaled(self.norm(self.conv(x)), 6).view(x.shape[0], 6, -1).mean(dim=2)
        return {answer}


def build():
    return Network()
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> tuple[Project, Any]:
    project = Project(tmp_path_factory.mktemp("cast") / "project")
    for name, lines in MODELS.items():
        shutil.copy(tiny_weights, project.model(name, SPEC + lines))
    return project, project.doit()


def loaded(project: Project, path: str) -> Any:
    return torch.jit.load(project / "build" / path)


def constants(module: Any) -> list[torch.Tensor]:
    module.eval()
    torch._C._jit_pass_inline(module.graph)
    found = module.graph.findAllNodes("prim::Constant")
    return [c.t("value") for c in found if c.hasAttribute("value") and c.kindOf("value") == "t"]


def row(project: Project, name: str) -> dict[str, Any]:
    """The one artifact of a model's summary."""
    (found,) = json.loads((project / f"build/{name}/accuracy.json").read_text())["artifacts"]
    return dict(found)


def test_a_model_served_in_fp32_is_not_cast(built: tuple[Project, Any]) -> None:
    _, run = built
    assert run.code == 0, run.out
    casts = {task for task in run.ran if task.startswith("cast:")}
    assert casts == {f"cast:{name}" for name in MODELS} - {"cast:plain"}


@pytest.mark.parametrize(
    ("name", "precision", "least", "most"),
    [
        ("plain", "fp32", 0, 1e-5),
        ("last", "fp32", 0, 1e-5),
        ("on_gpu", "fp16", 1e-5, 1e-2),
        ("from_bytes", "fp16", 1e-7, 1e-2),
        ("open", "bf16", 1e-3, 5e-2),
    ],
)
def test_a_cast_artifact_is_judged_by_the_gate_of_its_precision(
    built: tuple[Project, Any], name: str, precision: str, least: float, most: float
) -> None:
    project, _ = built
    found = row(project, name)
    file = "model.pt" if name == "plain" else f"model.{precision}.pt"
    assert (found["file"], found["precision"]) == (file, precision)
    assert found["status"] == ("not testable" if name == "from_bytes" else "ok"), "its probabilities are nearly equal"
    assert found["artifact"] == ("TorchScript" if precision == "fp32" else f"{precision} TorchScript")
    assert least <= found["outputs"]["OUTPUT__0"]["relative_l2"] < most


@pytest.mark.parametrize(
    ("name", "precision", "dtype"), [("on_gpu", "fp16", torch.float16), ("open", "bf16", torch.bfloat16)]
)
def test_clients_send_and_get_fp32_and_the_rest_has_the_precision(
    built: tuple[Project, Any], name: str, precision: str, dtype: torch.dtype
) -> None:
    project, _ = built
    module = loaded(project, f"{name}/model.{precision}.pt")
    answer = torchscript_graph.run_with_gpu_rounding(module, torch.randn(2, 3, 64, 64))
    assert (answer.dtype, answer.shape) == (torch.float32, (2, 1000))
    assert list(module.parameters()) == [], "the weights of a frozen trace are constants"
    assert {value.dtype for value in constants(module) if value.is_floating_point()} == {dtype}
    config = (project / f"model_repository/{name}/config.pbtxt").read_text()
    plain = (project / "model_repository/plain/config.pbtxt").read_text()

    def tensors(text: str) -> list[Any]:
        parsed = text_format.Parse(text, ModelConfig())
        return [parsed.input, parsed.output]

    if name == "on_gpu":
        assert tensors(config) == tensors(plain)


@pytest.mark.parametrize(
    ("path", "last"),
    [
        ("on_gpu/model.fp16.pt", True),
        ("last/model.fp32.pt", True),
        ("from_bytes/model.fp16.pt", True),
        ("open/model.bf16.pt", False),
        ("on_gpu/model.pt", False),
    ],
)
def test_filters_have_the_memory_format(built: tuple[Project, Any], path: str, last: bool) -> None:
    filters = [value for value in constants(loaded(built[0], path)) if value.ndim == 4 and min(value.shape[1:]) > 1]
    assert len(filters) > 1
    assert {value.is_contiguous(memory_format=torch.channels_last) for value in filters} == {last}
    assert {value.is_contiguous() for value in filters} == {not last}


def test_bytes_are_normalized_inside_and_classes_stay_integers(built: tuple[Project, Any]) -> None:
    project, _ = built
    batch = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    scores, classes = torchscript_graph.run_with_gpu_rounding(loaded(project, "from_bytes/model.fp16.pt"), batch)
    expected, _ = loaded(project, "from_bytes/model.pt")(batch)
    assert (scores.dtype, classes.dtype) == (torch.float32, torch.int64)
    torch.testing.assert_close(scores, expected, rtol=1e-2, atol=0)


def test_rounding_equals_the_cpu_except_for_the_order_of_sums(built: tuple[Project, Any]) -> None:
    """The emulated fp16 is nearer to PyTorch's fp16 on a CPU than to fp32."""
    project, _ = built
    batch = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    module = loaded(project, "on_gpu/model.fp16.pt")
    with torch.inference_mode():
        exact, native = loaded(project, "on_gpu/model.pt")(batch), module(batch)
    rounded = torchscript_graph.run_with_gpu_rounding(module, batch)

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found - expected).norm() / expected.norm())

    assert error(rounded, native) < error(rounded, exact)
    assert 0.5 < error(rounded, exact) / error(native, exact) < 2


def test_open_sizes_stay_open(built: tuple[Project, Any]) -> None:
    module = loaded(built[0], "open/model.bf16.pt")
    for size in ((64, 64), (96, 64)):
        assert torchscript_graph.run_with_gpu_rounding(module, torch.randn(2, 3, *size)).shape == (2, 1000)


def test_the_published_file_has_the_name_that_triton_expects(built: tuple[Project, Any]) -> None:
    project, _ = built
    for name, file in (("on_gpu", "model.fp16.pt"), ("open", "model.bf16.pt"), ("plain", "model.pt")):
        assert sorted(project.tree(f"model_repository/{name}/1")) == sorted(["model.pt", *VERSION_RECORDS])
        published = (project / f"model_repository/{name}/1/model.pt").read_bytes()
        assert published == (project / f"build/{name}/{file}").read_bytes()


def test_the_same_trace_gives_the_same_bytes(built: tuple[Project, Any], tmp_path: Path, tiny_weights: Path) -> None:
    project, _ = built
    other = Project(tmp_path / "a" / "longer" / "path")
    shutil.copy(tiny_weights, other.model("half", SPEC + MODELS["on_gpu"]))
    other.built("cast:half", PYTHONHASHSEED="20261126")
    for file in ("model.fp16.pt", "model.fp16.pt.signature.json", "model.fp16.pt.tools.json"):
        assert (other / f"build/half/{file}").read_bytes() == (project / f"build/on_gpu/{file}").read_bytes(), file
    assert b"debug_pkl" not in (other / "build/half/model.fp16.pt").read_bytes()


def test_a_refused_cast_has_advice_and_leaves_the_published_model(
    built: tuple[Project, Any], copy_of: Callable[[Project], Project]
) -> None:
    project = copy_of(built[0])
    before = project.tree("model_repository/plain")
    rule = '[torchscript]\nprecision = "bf16"\n[[accuracy.gate]]\nprecision = "bf16"\nrelative_l2 = 1e-5\n'
    with (project / "models/plain/model.toml").open("a") as file:
        file.write(rule)
    run = project.doit("plain")
    assert (run.code, run.failed) == (1, ["accuracy:plain"])
    line = failure_line(run, "accuracy:plain")
    assert "limit 1.0e-05" in line
    assert "try another torchscript.precision (fp32 serves model.pt itself)" in line
    assert 'or an [[accuracy.gate]] with format = "torchscript"' in line
    assert project.tree("model_repository/plain") == before
    project.edit("models/plain/model.toml", rule, "")
    project.built("plain")
    assert project.tree("model_repository/plain") == before


NETWORK_SPEC = f"""\
formats = ["torchscript"]
max_batch_size = 3
[architecture]
network = "network.py:build"
[weights]
source = "random://0"
[input]
shape = [3, 16, 16]
{HALF}"""


def test_types_inside_the_network_are_cast_too(project: Project) -> None:
    project.model(
        "several", NETWORK_SPEC, network_py=NETWORK.replace("{answer}", "mean, mean.argmax(1), mean.double()")
    )
    project.built("cast:several")
    module = loaded(project, "several/model.fp16.pt")
    batch = torch.randn(2, 3, 16, 16)
    answers, expected = (
        torchscript_graph.run_with_gpu_rounding(module, batch),
        loaded(project, "several/model.pt")(batch),
    )
    assert [answer.dtype for answer in answers] == [torch.float32, torch.int64, torch.float64]
    for found, exact in zip(answers[::2], expected[::2], strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)
    assert not torch.equal(answers[0], expected[0]), "the outputs are rounded"


def test_for_a_gpu_the_graph_is_rewritten_and_the_signature_says_that_it_needs_one(project: Project) -> None:
    network = NETWORK.replace("self.norm(self.conv(x))", "torch.relu(self.norm(self.conv(x)))")
    for name, table in (("on_gpu", '[triton]\ndevice = "gpu"\n'), ("anywhere", HALF)):
        spec = NETWORK_SPEC.replace(HALF, table)
        project.model(name, spec, network_py=network.replace("{answer}", "mean"))
    run = project.built("cast:on_gpu", "cast:anywhere")
    assert "rewritten: 1 ReLU in convolutions" in run.out
    for name, needs_gpu in (("on_gpu", True), ("anywhere", None)):
        signature = json.loads((project / f"build/{name}/model.fp16.pt.signature.json").read_text())
        assert signature.get("needs_gpu") is needs_gpu
    batch = torch.randn(2, 3, 16, 16)
    rewritten, cast = (
        torchscript_graph.run_with_gpu_rounding(loaded(project, f"{name}/model.fp16.pt"), batch)
        for name in ("on_gpu", "anywhere")
    )
    torch.testing.assert_close(rewritten, cast, rtol=5e-3, atol=5e-3)
    run = project.doit("bench:on_gpu", "--seconds", "0.1")
    assert run.code, run.out
    assert "torchscript: the file was cast for a GPU (triton.device), and PyTorch sees none here" in run.out


def test_a_trace_that_cannot_run_in_the_precision_is_one_line(project: Project) -> None:
    too_large = "mean.masked_fill(mean > 1, torch.finfo(torch.float32).min)"
    project.model("large", NETWORK_SPEC, network_py=NETWORK.replace("{answer}", too_large))
    run = project.doit("cast:large")
    line = failure_line(run, "cast:large")
    assert "the trace does not run in fp16: aten.masked_fill.Scalar: value cannot be converted" in line
    assert 'with torchscript.precision = "fp32" model.pt is served as it is' in line
    assert not (project / "build/large/model.fp16.pt").exists()
