"""Packages of AOTInductor: a small network, compiled for this machine's CPU, gated, published, and served by a stub."""

import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build_tasks.errors import UserError
from build_tasks.json_files import read_json
from build_tasks.runtime import hardware
from build_tasks.serving import triton_server
from build_tasks.stages import aoti
from tests.support import core_server, tiny_network
from tests.support.project import ROOT, Project, failure_line

PACKAGE = "build/packed/model.pt2"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with one model, whose only format is aoti. To compile it takes some 20 s of one core."""
    project = Project(tmp_path_factory.mktemp("aoti") / "project")
    tiny_network.add(project, "packed", formats='"aoti"', body="x = torch.relu(x)")
    run = project.built()
    assert "aoti:packed" in run.ran
    assert {f"{stage}:packed_aoti" for stage in ("measure", "accuracy", "config", "client", "publish")} <= set(run.ran)
    return project


def test_a_package_is_for_the_instruction_set_of_this_machine(project: Project) -> None:
    signature = read_json(f"{project / PACKAGE}.signature.json")
    assert (signature["device"], signature["instruction set"]) == ("cpu", hardware.instruction_set())
    (profile,) = signature["profiles"]
    assert [profile["INPUT__0"][point] for point in ("min", "opt", "max")] == [[n, 3, 16, 16] for n in (1, 3, 3)]
    assert [each["shape"] for each in (*signature["inputs"], *signature["outputs"])] == [[-1, 3, 16, 16], [-1, 4]]
    measured = read_json(f"{project / PACKAGE}.measured.json")
    assert measured["device"] == "CPU"
    assert measured["outputs"]["OUTPUT__0"]["worst_batch"]["difference"] == 0
    assert "up to date" in project.built().out


def test_a_package_holds_no_path_of_this_machine(project: Project) -> None:
    content = (project / PACKAGE).read_bytes()
    for path in (str(project.root), tempfile.gettempdir(), sys.prefix, "aoti-"):
        assert path.encode() not in content, path


def test_the_published_config_is_the_golden_one(project: Project) -> None:
    text = (project / "model_repository/packed_aoti/config.pbtxt").read_text()
    config = text_format.Parse(text, ModelConfig())
    tools = config.parameters["provenance.1.tools"].string_value
    assert f"instruction set {hardware.instruction_set()}" in tools
    assert "C++ compiler " in tools
    config.ClearField("parameters")
    assert config == text_format.Parse((ROOT / "tests/triton/golden/packed_aoti.pbtxt").read_text(), ModelConfig())
    assert (project / "model_repository/packed_aoti/1/model.pt2").exists()


@pytest.fixture(scope="module")
def server(project: Project) -> Iterator[triton_server.Server]:
    with core_server.serving(project) as running:
        yield running


def test_tritons_core_serves_mixed_batches_of_many_requests_at_once(
    project: Project, server: triton_server.Server
) -> None:
    assert server.load("packed_aoti") is None
    run = project.built("smoke", f"--url={server.http}", f"--grpc={server.grpc}")
    assert len(re.findall(r"^ packed_aoti .* ok$", run.out, re.MULTILINE)) == 2, run.out


def test_the_stub_refuses_what_the_backend_refuses(project: Project, server: triton_server.Server) -> None:
    config = Path("model_repository/packed_aoti/config.pbtxt")
    text = config.read_text()
    config.write_text(text.replace('name: "OUTPUT__0"', 'name: "scores"'))
    try:
        assert 'io_data does not contain name: "scores"' in str(server.load("packed_aoti"))
    finally:
        config.write_text(text)


def test_bench_measures_the_package(project: Project) -> None:
    run = project.built("bench:packed", "--seconds", "0.05", "--batches", "1,3", "--concurrency", "1")
    assert re.search(r"^ *aoti +3 +1 ", run.out, re.MULTILINE), run.out
    assert "[triton.aoti]" in run.out


@pytest.mark.long  # a second compilation; 20 s of one core
def test_the_same_inputs_give_the_same_bytes(project: Project) -> None:
    run = project.built("rebuild", "packed")
    assert re.search(r"^(\d+) of \1 targets have the same bytes$", run.out, re.MULTILINE), run.out


def test_without_a_compiler_the_stage_names_it_and_the_package_stays(project: Project, tmp_path: Path) -> None:
    without = project.copy(tmp_path / "copy")
    assert "up to date" in without.built(CXX="no-such-compiler").out
    without.edit("models/packed/model.toml", "max_batch_size = 3", "max_batch_size = 2")
    run = without.doit("packed", CXX="no-such-compiler")
    assert "lacks a C++ compiler, g++ (or set CXX)" in failure_line(run, "aoti:packed", "–")


def network() -> Any:
    """A network with what a cast has to find: a constant, a view, a dtype, a picture and other inputs."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.embedding = torch.nn.Embedding(10, 4)

        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            x = self.conv(x).view(x.shape[0], 4, -1).mean(dim=2)
            scores = x + self.embedding(ids).to(torch.float32) * torch.tensor([1.0, 2.0, 3.0, 4.0])
            return scores.softmax(dim=1).topk(2, dim=1)[0], scores

    torch.manual_seed(0)
    return Network().eval().requires_grad_(False)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_cast_program_computes_in_its_precision_and_answers_in_fp32(precision: str) -> None:
    import torch

    from build_tasks.formats.torch_export import cast_program
    from build_tasks.formats.torchscript_graph import DTYPES

    batch = torch.export.Dim("batch", max=8)
    example = (torch.randn(2, 3, 6, 6), torch.tensor([1, 2]))
    shapes = ({0: batch}, {0: batch})
    module = network()
    program = torch.export.export(module, example, dynamic_shapes=shapes)
    cast = cast_program(program, DTYPES[precision], [True, False], shapes)
    dtypes = {node.name: node.meta["val"].dtype for node in cast.graph.nodes if hasattr(node.meta.get("val"), "dtype")}
    assert {dtypes[name] for name in dtypes if name.startswith(("conv2d", "embedding", "mean", "add"))} == {
        DTYPES[precision]
    }
    assert {dtypes[name] for name in dtypes if name.startswith(("softmax", "topk"))} == {torch.float32}
    inputs = (torch.randn(5, 3, 6, 6), torch.arange(5))
    for answer, expected in zip(cast.module()(*inputs), module(*inputs), strict=True):
        assert answer.dtype == torch.float32
        assert 0 < float((answer - expected).norm() / expected.norm()) < 2e-2


def test_tensors_with_names_of_their_own_are_refused_before_anything_is_compiled() -> None:
    tensors = {"inputs": [{"name": "INPUT__0"}], "outputs": [{"name": "OUTPUT__0"}, {"name": "logits"}]}
    with pytest.raises(UserError, match=r"outputs\[1\]\.name: expected 'OUTPUT__1', .* found 'logits'"):
        aoti.require_places(tensors)


CPUINFO = {
    "x86-64-v4 avx512_bf16 avx512_vnni": "avx2 fma avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni avx512_bf16",
    "x86-64-v3": "sse avx2 fma",
    "x86-64": "sse",
}


@pytest.mark.parametrize("expected", CPUINFO)
def test_the_instruction_set_is_a_level_and_what_inductor_uses_besides(
    expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins
    import io

    monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(
        builtins, "open", lambda *_, **__: contextlib.nullcontext(io.StringIO(f"flags\t\t: {CPUINFO[expected]}\n"))
    )
    assert hardware.instruction_set.__wrapped__() == expected
