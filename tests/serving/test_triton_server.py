"""Triton's own server, in its core from PyPI, over repositories that were built here.

Its Python backend runs the Python models for real, and ONNX and TorchScript models by stand-ins for their backends,
with the same libraries, in that. What the core checks, schedules, warms up and answers is the server's own.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build_tasks.errors import UserError
from build_tasks.serving import triton_server
from build_tasks.serving.triton_client import Client
from tests.support import specs_served, tiny_network
from tests.support.project import ROOT, Project

GOLDEN = sorted(path.stem for path in (ROOT / "tests/triton/golden").glob("*.pbtxt") if not path.stem.endswith("_trt"))
One = Callable[[str], Project]
Serving = Callable[[Project], tuple[triton_server.Server, Client]]

PICTURE = ROOT / "build_tasks/verification/photographs/coffee.jpg"


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The models of specs_served.py, built, with the server's core; tests that change them copy it."""
    project = Project(tmp_path_factory.mktemp("served") / "project")
    for name in specs_served.SPECS:
        specs_served.add(project, name)
    project.built()
    project.built("tritonserver")
    return project


@pytest.fixture
def one_of_them(all_of_them: Project, tmp_path: Path) -> Callable[[str], Project]:
    """A copy of the project with one model; the core is shared by a link."""

    def copied(name: str) -> Project:
        copy = all_of_them.copy(
            tmp_path / "copy",
            ignore=lambda folder, names: [
                entry
                for entry in names
                if (folder.endswith(("/models", "/build")) and entry in specs_served.SPECS and entry != name)
                or entry == ".tritonserver"
                or (folder.endswith("/model_repository") and entry not in (name, *(f"{name}_{s}" for s in SUFFIXES)))
            ],
        )
        (copy / "build/.tritonserver").symlink_to(all_of_them / "build/.tritonserver")
        return copy

    return copied


SUFFIXES = ("onnx", "preprocess", "ensemble")


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """Start the server over a project, with the stand-ins, and nothing loaded."""
    import contextlib

    with contextlib.ExitStack() as running:

        def start(project: Project) -> tuple[triton_server.Server, Client]:
            monkeypatch.chdir(project.root)
            server = running.enter_context(
                triton_server.started("core", "26.08", triton_server.free_ports(), "build/test.log", stand_ins=True)
            )
            return server, Client("HTTP", server.http)

        yield start


def parsed(path: Path) -> ModelConfig:
    """Without the provenance, which tells of this machine's tools."""
    config = text_format.Parse(path.read_text(), ModelConfig())
    for key in [key for key in config.parameters if key.startswith("provenance.")]:
        del config.parameters[key]
    return config


@pytest.mark.parametrize("name", GOLDEN)
def test_a_config_is_as_it_should_be(all_of_them: Project, name: str) -> None:
    found = parsed(all_of_them / f"model_repository/{name}/config.pbtxt")
    assert found == parsed(ROOT / f"tests/triton/golden/{name}.pbtxt")


def test_there_is_a_golden_config_of_every_model_that_is_published(all_of_them: Project) -> None:
    assert sorted(path.name for path in (all_of_them / "model_repository").iterdir()) == GOLDEN


def test_check_loads_every_model_in_the_server(all_of_them: Project) -> None:
    """Strictly, with its warm-up: what is accepted here contradicts neither the artifact nor itself."""
    run = all_of_them.built("check", "--server", "core", "--stand_ins")
    for name in GOLDEN:
        assert f"\n  {name}: ok" in run.out, run.out
    assert "  pictures_preprocess: ok, 3 pictures prepared, off from timm's by 0.0e+00" in run.out


def test_a_backend_that_is_not_here_is_said(all_of_them: Project) -> None:
    run = all_of_them.built("check", "--server", "core")
    for name in GOLDEN:
        if name.endswith("_preprocess"):
            said = "ok, 3 pictures prepared"
        elif name.endswith("_ensemble"):
            step = name.replace("ensemble", "onnx") if name.startswith("pictures") else name.removesuffix("_ensemble")
            backend = "onnxruntime" if step.endswith("_onnx") else "pytorch"
            said = f"config accepted, backend {backend} not on this machine, for its step {step}"
        else:
            backend = "onnxruntime" if name.endswith("_onnx") else "pytorch"
            said = f"config accepted, backend {backend} not on this machine"
        assert f"\n  {name}: {said}" in run.out


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("dims: 16", "dims: 0", "dimension must be integer >= 1, or -1 to indicate a variable-size dimension"),
        ("TYPE_FP32", "TYPE_FP33", 'Unknown enumeration value of "TYPE_FP33" for field "data_type"'),
        (
            "dynamic_batching {",
            "dynamic_batching { preferred_batch_size: 9",
            "dynamic batching preferred size must be <=",
        ),
        ("pytorch_libtorch", "onnxruntime_pytorch", "unexpected platform type 'onnxruntime_pytorch'"),
    ],
)
def test_what_the_server_refuses_fails_with_its_reason(one_of_them: One, old: str, new: str, reason: str) -> None:
    project = one_of_them("plain")
    project.edit("model_repository/plain/config.pbtxt", old, new)
    run = project.doit("check", "--server", "core", "--stand_ins")
    assert run.code == 1
    assert reason in next(line for line in run.out.splitlines() if line.startswith("  plain: refused: "))
    assert "  plain_onnx: ok" in run.out
    assert "Triton refuses plain; its log: build/check.log" in run.out


def test_instances_on_a_gpu_are_accepted_as_far_as_this_machine_goes(one_of_them: One) -> None:
    project = one_of_them("plain")
    project.edit("models/plain/model.toml", "[onnx]", '[triton]\ndevice = "gpu"\n[onnx]')
    project.built()
    run = project.built("check", "--server", "core", "--stand_ins")
    assert "  plain: config accepted, KIND_GPU, and no GPU on this machine" in run.out


def test_nothing_to_check_and_no_server_are_said(project: Project) -> None:
    tiny_network.add(project, "net", formats='"onnx"')
    run = project.doit("check", "--server", "core")
    assert run.code == 1
    assert "model_repository/ has no model; `doit` builds them" in run.out
    project.built()
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "docker").exists())
    run = project.doit("check", PATH=path)
    assert run.code == 1
    assert "there is no Triton here: neither tritonserver on the PATH, nor Docker" in run.out


def test_the_ensemble_answers_to_pictures(one_of_them: One, serving: Serving) -> None:
    """JPEGs in, and out what the reference of the fp32 network says of them; one that is none fails alone."""
    project = one_of_them("pictures")
    server, client = serving(project)
    assert server.load("pictures_ensemble") is None
    encoded = [path.read_bytes() for path in sorted((ROOT / "build_tasks/verification/photographs").glob("*.jpg"))[:3]]
    tensors = client.tensors("pictures_ensemble")
    assert (tensors.input, tensors.type) == ("IMAGE", "BYTES")
    _, (scores,) = client.infer("pictures_ensemble", tensors, np.array([[data] for data in encoded], dtype=object))
    from polygraphy.comparator import RunResults

    expected = RunResults.load(str(project / "build/pictures/reference.json"))["pytorch-fp32"][0]["OUTPUT__0"][:3]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    with pytest.raises(UserError, match="not a picture"):
        client.infer("pictures_ensemble", tensors, np.array([[b"GIF89a, or so"]], dtype=object))
    _, (again,) = client.infer("pictures_ensemble", tensors, np.array([[encoded[0]]], dtype=object))
    np.testing.assert_allclose(again, scores[:1], rtol=1e-4)


def test_a_server_can_be_asked_what_it_serves(one_of_them: One, serving: Serving) -> None:
    project = one_of_them("plain")
    server, client = serving(project)
    assert server.load("plain_onnx") is None
    told = {key: value["string_value"] for key, value in client.config("plain_onnx")["parameters"].items()}
    import hashlib

    def sha256(path: str) -> str:
        return hashlib.sha256((project / path).read_bytes()).hexdigest()

    assert told["provenance.1.build"] == sha256("build/plain/model.onnx")
    assert told["provenance.1.weights"] == sha256("build/plain/weights.safetensors")
    assert len(told["provenance.1.spec"]) == 64
    assert {word.split()[0] for word in told["provenance.1.tools"].split(", ")} >= {"torch", "onnx", "onnxruntime"}


def weights_of(project: Project, name: str, seed: int) -> None:
    import torch
    from safetensors.torch import save_file
    from torch import nn

    torch.manual_seed(seed)
    layers = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "head": nn.Linear(5, 4)})
    save_file(layers.state_dict(), project / f"models/{name}/weights.safetensors")


@pytest.mark.parametrize("provenance", [pytest.param(True, marks=pytest.mark.long), False])
def test_a_new_version_does_not_disturb_the_one_that_is_served(
    one_of_them: One, serving: Serving, provenance: bool
) -> None:
    """Version 1 is asked all the time, while version 2 is built, published and loaded."""
    project = one_of_them("versions")
    if not provenance:
        project.edit("models/versions/model.toml", "keep_versions = 3", "keep_versions = 3\nprovenance = false")
    project.edit("models/versions/model.toml", "[1]", "[1, 2]")
    project.edit("models/versions/model.toml", "version_policy", "# version_policy")
    project.built()
    server, client = serving(project)
    assert server.load("versions_onnx") is None
    tensors = client.tensors("versions_onnx")
    batch = np.random.default_rng(0).random((2, 3, 16, 16), np.float32)
    first = client.infer("versions_onnx", tensors, batch)[1][0]
    inode = os.stat("model_repository/versions_onnx/1/model.onnx")

    failures, answers, stop = [], [], threading.Event()

    def ask() -> None:
        import tritonclient.grpc as grpc

        mine = grpc.InferenceServerClient(server.grpc)
        tensor = grpc.InferInput("INPUT__0", [2, 3, 16, 16], "FP32")
        tensor.set_data_from_numpy(batch)
        while not stop.is_set():
            try:
                answer = mine.infer("versions_onnx", [tensor], model_version="1")
                answers.append(np.array_equal(answer.as_numpy("OUTPUT__0"), first))
            except Exception as error:
                failures.append(str(error))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        weights_of(project, "versions", seed=2)
        assert "versions: 1, 2" in project.built().out
        assert server.load("versions_onnx") is None
        version, (second,) = client.infer("versions_onnx", tensors, batch)
        assert version == "2"
        assert not np.array_equal(second, first)
        before = len(answers)
        while len(answers) < before + 20:
            assert asking.is_alive()
    finally:
        stop.set()
        asking.join()
    assert not failures
    assert len(answers) > 50
    assert all(answers), "version 1 answers as before"
    now = os.stat("model_repository/versions_onnx/1/model.onnx")
    assert (now.st_ino, now.st_ctime_ns) == (inode.st_ino, inode.st_ctime_ns), "its files were not touched"
    log = Path("build/test.log").read_text()
    reloaded = log.count("successfully loaded 'versions_onnx'")
    assert log.count("TRITONBACKEND_ModelInstanceInitialize: versions_onnx") == (3 if provenance else 2), reloaded


def test_the_oldest_version_goes_when_there_are_too_many(one_of_them: One) -> None:
    project = one_of_them("versions")
    project.edit("models/versions/model.toml", "version_policy", "# version_policy")
    project.built()
    for seed in (2, 3, 4):
        weights_of(project, "versions", seed)
        project.built()
    folder = project / "model_repository/versions"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["2", "3", "4"]
    told = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig()).parameters
    builds = {key: told[key].string_value for key in told if key.endswith(".build")}
    assert set(builds) == {f"provenance.{version}.build" for version in (2, 3, 4)}
    assert len(set(builds.values())) == 3
    assert json.loads((folder / "3/provenance.json").read_text())["build"] == builds["provenance.3.build"]
    assert project.built().ran == []
    (folder / "3/model.pt").write_bytes(b"damaged")
    assert "dropped: 3, with other tensors, or not as published" in project.built().out
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["2", "4"]


def test_versions_with_other_tensors_are_not_kept_under_one_config(one_of_them: One) -> None:
    project = one_of_them("versions")
    project.edit("models/versions/model.toml", "version_policy", "# version_policy")
    project.edit("models/versions/model.toml", "shape = [3, 16, 16]", "shape = [3, 16, 20]")
    run = project.built()
    assert "versions: 2, dropped: 1, with other tensors" in run.out
    folders = [path.name for path in (project / "model_repository/versions").iterdir() if path.is_dir()]
    assert folders == ["2"]


def test_a_version_that_a_policy_names_must_be_there(one_of_them: One) -> None:
    project = one_of_them("versions")
    before = project.tree()
    project.edit("models/versions/model.toml", "versions = [1]", "versions = [1, 7]")
    run = project.doit()
    assert run.code == 1
    assert "triton.version_policy.specific: there is no version 7, only 1" in run.out
    assert {k: v for k, v in project.tree().items() if k.startswith("versions_onnx")} == {
        k: v for k, v in before.items() if k.startswith("versions_onnx")
    }


def smoke(project: Project, server: triton_server.Server, *more: str) -> tuple[int, str]:
    run = project.doit("smoke", "--url", server.http, "--grpc", server.grpc, *more)
    return run.code, run.out


def test_smoke_judges_a_running_server_by_the_gate(one_of_them: One, serving: Serving) -> None:
    project = one_of_them("pictures")
    server, _ = serving(project)
    for name in ("pictures_onnx", "pictures_ensemble"):
        assert server.load(name) is None
    code, out = smoke(project, server)
    assert code == 0, out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("pictures")]
    assert sorted((row[0], row[1], row[-1]) for row in rows) == [
        (name, protocol, "ok")
        for name in ("pictures_ensemble", "pictures_onnx", "pictures_preprocess")
        for protocol in ("HTTP", "gRPC")
    ]
    assert all(row[-2] == "ms" for row in rows), "latencies are told"

    weights_of(project, "pictures", seed=2)  # the server still serves the old
    project.built()
    code, out = smoke(project, server, "--model", "pictures_onnx")
    assert code == 1
    assert "pictures_onnx (HTTP): output OUTPUT__0: " in out
    project.edit("models/pictures/model.toml", 'source = "weights', '# as before\nsource = "weights')
    code, out = smoke(project, server, "--model", "pictures_preprocess")
    assert code == 0, "what did not change is still right"


def test_smoke_tells_another_build_from_the_newest(one_of_them: One, serving: Serving) -> None:
    project = one_of_them("plain")
    server, _ = serving(project)
    assert server.load("plain_onnx") is None
    (project / "models/plain/model.toml").write_text(
        (project / "models/plain/model.toml").read_text().replace("[onnx]", "[onnx]\nopset = 16")
    )
    project.built()
    code, out = smoke(project, server, "--model", "plain_onnx")
    assert code == 1
    assert "plain_onnx (HTTP): version 1 is build " in out
    code, out = smoke(project, server, "--model", "plain")
    assert code == 1
    assert "plain (HTTP): it is not loaded" in out


def test_smoke_without_a_server_says_how_to_start_one(one_of_them: One) -> None:
    project = one_of_them("plain")
    port = triton_server.free_ports().http
    run = project.doit("smoke", "--url", f"127.0.0.1:{port}")
    assert run.code == 1
    assert f"nothing answers HTTP at 127.0.0.1:{port}" in run.out
    assert "`doit serve` starts a server" in run.out
    assert "expected host:port, found 'nonsense'" in project.doit("smoke", "--url", "nonsense").out
    assert "has no model 'nope' of the specs" in project.doit("smoke", "--model", "nope").out


@pytest.mark.parametrize("name", ["pictures_ensemble", "pictures_onnx", "from_bytes_onnx", "plain", "fixed_onnx"])
def test_the_examples_of_clients_run_as_they_stand(all_of_them: Project, serving: Serving, name: str) -> None:
    server, _ = serving(all_of_them)
    assert server.load(name) is None
    model = name.removesuffix("_ensemble").removesuffix("_onnx")
    folder = all_of_them / f"build/{model}/clients/{name}"
    said = []
    for protocol, url in (("http", server.http), ("grpc", server.grpc)):
        script = folder / f"{protocol}_client.py"
        run = subprocess.run(
            [sys.executable, "-W", "error", script, PICTURE],
            env={**os.environ, "TRITON_URL": url},
            text=True,
            capture_output=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        said.append(run.stdout)
        body = script.read_text().split('"""')[2]
        assert len([line for line in body.splitlines() if line.strip()]) <= 18
    assert said[0] == said[1]
    assert said[0].startswith(str(PICTURE))
    if name.startswith("pictures"):
        assert {line.split()[1] for line in said[0].splitlines()[1:5]} == {"one", "two", "three", "four"}


def test_serve_serves_until_it_is_told_to_end(one_of_them: One) -> None:
    project = one_of_them("plain")
    ports = triton_server.free_ports()
    options = [word for name, port in ports._asdict().items() for word in (f"--{name}", str(port))]
    with project.start("serve", "--server", "core", *options) as process:
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("serving:"):
                break
        assert "  plain: ok\n" in lines
        assert Client("gRPC", f"127.0.0.1:{ports.grpc}").ready("plain_onnx")
        process.terminate()
        assert process.wait(60) == 143
        assert "interrupted by SIGTERM" in process.stdout.read()
    with pytest.raises(UserError, match="nothing answers"):
        Client("HTTP", f"127.0.0.1:{ports.http}").ready("plain")
