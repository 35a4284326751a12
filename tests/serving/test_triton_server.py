"""Triton's own server, in its core from PyPI, over repositories that were built here.

Its Python backend runs the Python models. Stub backends run ONNX and TorchScript models with the same libraries, in the
Python backend. The core checks, schedules, warms up and answers as any Triton server does.
"""

import ctypes.util
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from tritonclient.grpc.model_config_pb2 import ModelConfig

from build_tasks.errors import UserError
from build_tasks.provenance.statement import read_provenance
from build_tasks.serving import server_kinds, triton_client, triton_core, triton_server
from build_tasks.serving.triton_client import Client
from tests.support import specs_served, tiny_network
from tests.support.project import ROOT, Project

# See tests/triton/test_model_config.py, tests/stages/test_aoti.py and tests/serving/test_core_from_spec.py.
ELSEWHERE = ("_trt", "_aoti", "sums_onnx")
GOLDEN = sorted(
    path.stem for path in (ROOT / "tests/triton/golden").glob("*.pbtxt") if not path.stem.endswith(ELSEWHERE)
)
CopyOf = Callable[[str], Project]
Serving = Callable[[Project], tuple[triton_server.Server, Client]]

PICTURE = ROOT / "build_tasks/verification/photographs/coffee.jpg"


@pytest.fixture(scope="module")
def all_models(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The models of specs_served.py, built, with the server's core. Tests that change the project copy it."""
    project = Project(tmp_path_factory.mktemp("served") / "project")
    for name in specs_served.SPECS:
        specs_served.add(project, name)
    project.built()
    project.built("tritonserver")
    return project


@pytest.fixture
def project_with(all_models: Project, tmp_path: Path) -> Callable[[str], Project]:
    """Returns a copy of the project with one model. A symbolic link shares the core."""

    def copy_with(name: str) -> Project:
        copy = all_models.copy(
            tmp_path / "copy",
            ignore=lambda folder, names: [
                entry
                for entry in names
                if (folder.endswith(("/models", "/build")) and entry in specs_served.SPECS and entry != name)
                or entry == ".tritonserver"
                or (folder.endswith("/model_repository") and entry not in (name, *(f"{name}_{s}" for s in SUFFIXES)))
            ],
        )
        (copy / "build/.tritonserver").symlink_to(all_models / "build/.tritonserver")
        return copy

    return copy_with


SUFFIXES = ("onnx", "preprocess", "ensemble")


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """Starts the server over a project, with the stub backends, and loads no model."""
    import contextlib

    with contextlib.ExitStack() as running:

        def start(project: Project) -> tuple[triton_server.Server, Client]:
            monkeypatch.chdir(project.root)
            server = running.enter_context(
                triton_server.start("core", "26.08", triton_server.free_ports(), "build/test.log", stubs=True)
            )
            return server, Client("HTTP", server.http)

        yield start


def parsed(path: Path) -> ModelConfig:
    """A config.pbtxt without its provenance, which names the tools of this machine."""
    config = text_format.Parse(path.read_text(), ModelConfig())
    for key in [key for key in config.parameters if key.startswith("provenance.")]:
        del config.parameters[key]
    return config


@pytest.mark.parametrize("name", GOLDEN)
def test_a_config_is_as_it_should_be(all_models: Project, name: str) -> None:
    config = parsed(all_models / f"model_repository/{name}/config.pbtxt")
    assert config == parsed(ROOT / f"tests/triton/golden/{name}.pbtxt")


def test_there_is_a_golden_config_of_every_model_that_is_published(all_models: Project) -> None:
    assert sorted(path.name for path in (all_models / "model_repository").iterdir()) == GOLDEN


def test_check_loads_every_model_in_the_server(all_models: Project) -> None:
    """The server loads strictly and warms up: the configs contradict neither themselves nor their artifacts."""
    run = all_models.built("check", "--server", "core", "--stubs")
    for name in GOLDEN:
        assert f"\n  {name}: ok" in run.out, run.out
    assert "  pictures_preprocess: ok, 3 images preprocessed, relative L2 error 0.0e+00 against timm" in run.out


def test_check_names_a_backend_that_this_machine_lacks(all_models: Project) -> None:
    run = all_models.built("check", "--server", "core")
    for name in GOLDEN:
        if name.endswith("_preprocess"):
            result = "ok, 3 images preprocessed"
        elif name.endswith("_ensemble"):
            step = name.replace("ensemble", "onnx") if name.startswith("pictures") else name.removesuffix("_ensemble")
            backend = "onnxruntime" if step.endswith("_onnx") else "pytorch"
            result = f"config accepted, but backend {backend} is not on this machine (for its step {step})"
        else:
            backend = "onnxruntime" if name.endswith("_onnx") else "pytorch"
            result = f"config accepted, but backend {backend} is not on this machine"
        assert f"\n  {name}: {result}" in run.out


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
def test_what_the_server_refuses_fails_with_its_reason(project_with: CopyOf, old: str, new: str, reason: str) -> None:
    project = project_with("plain")
    project.edit("model_repository/plain/config.pbtxt", old, new)
    run = project.doit("check", "--server", "core", "--stand_ins")  # the former name of --stubs
    assert run.code == 1
    assert reason in next(line for line in run.out.splitlines() if line.startswith("  plain: refused: "))
    assert "  plain_onnx: ok" in run.out
    assert "Triton refuses plain; the server's log: build/check.log" in run.out


def test_instances_on_a_gpu_are_accepted_as_far_as_this_machine_goes(project_with: CopyOf) -> None:
    project = project_with("plain")
    project.edit("models/plain/model.toml", "[onnx]", '[triton]\ndevice = "gpu"\n[onnx]')
    project.built()
    run = project.built("check", "--server", "core", "--stubs")
    assert "  plain: config accepted, but KIND_GPU needs a GPU, and this machine has none" in run.out


def test_check_without_models_or_without_a_server_says_so(project: Project) -> None:
    tiny_network.add(project, "net", formats='"onnx"')
    run = project.doit("check", "--server", "core")
    assert run.code == 1
    assert "model_repository/ has no model; `doit` builds them" in run.out
    project.built()
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "docker").exists())
    run = project.doit("check", PATH=path)
    assert run.code == 1
    assert "there is no Triton server on this machine: neither tritonserver on the PATH, nor Docker" in run.out


def test_a_python_that_the_core_does_not_support_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the advice would be to fetch a core that has no wheels for this Python."""
    monkeypatch.setattr(triton_core, "PYTHONS", ("3.5", "3.6"))
    reason = triton_core.unsupported_reason()
    assert reason is not None
    assert reason.startswith(
        "the server core from PyPI runs on Linux on x86-64 with Python 3.5 or 3.6, and this is Python"
    )
    assert server_kinds.core_advice() == reason


def test_a_python_without_its_shared_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton would wait for its process for Python models, which cannot start, until a timeout."""
    assert triton_core.unsupported_reason() is None
    monkeypatch.setattr(triton_core, "python_library", lambda: f"{tmp_path}/libpython3.11.so.1.0")
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    reason = triton_core.unsupported_reason()
    assert reason is not None
    assert reason.startswith("the server core needs libpython3.11.so.1.0, and this Python has none: install it")


def test_the_core_finds_the_shared_library_of_this_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also one where the loader does not look, as in an installation of pyenv or uv."""
    monkeypatch.chdir(tmp_path)
    stubs = tmp_path / f"{triton_core.HOME}/python_backend_stubs/{triton_core.VERSION}"
    for folder in (stubs, tmp_path / f"{triton_core.HOME}/backends/python"):
        folder.mkdir(parents=True)
    (stubs / "triton_python_backend_stub").touch()
    library = tmp_path / "libpython3.11.so.1.0"
    library.touch()
    monkeypatch.setattr(triton_core, "python_library", lambda: str(library))
    with triton_core.backend_directory(stubs=False) as backends:
        (added,) = triton_core.environment(backends)["LD_LIBRARY_PATH"].split(os.pathsep)[1:]
        assert (Path(added) / library.name).samefile(library)


def test_a_port_of_another_process_is_refused(tmp_path: Path) -> None:
    ports = triton_server.free_ports()
    with socket.create_server(("127.0.0.1", ports.grpc)):
        message = rf"port {ports.grpc} of 127.0.0.1 cannot be used \(Address already in use\); `--grpc PORT` takes"
        with pytest.raises(UserError, match=message), triton_server.start("core", "26.08", ports, f"{tmp_path}/log"):
            pass
    assert not (tmp_path / "log").exists()


def test_a_server_that_has_ended_is_the_reason_why_a_model_is_not_loaded(tmp_path: Path) -> None:
    url = f"127.0.0.1:{triton_server.free_ports().http}"
    with subprocess.Popen(["true"]) as process, open(tmp_path / "log", "w+") as log:
        server = triton_server.Server(url, url, log, process)
        with pytest.raises(triton_server.NoAnswerError, match=r"the server ended with exit code 0 while it loaded"):
            server.load("net")


def test_the_ensemble_answers_to_pictures(project_with: CopyOf, serving: Serving) -> None:
    """JPEG files give the outputs of the fp32 network. A request with an image that is refused fails at once, and later
    ones do not."""
    project = project_with("pictures")
    server, client = serving(project)
    assert server.load("pictures_ensemble") is None
    encoded = [path.read_bytes() for path in sorted((ROOT / "build_tasks/verification/photographs").glob("*.jpg"))[:3]]
    tensors = client.tensors("pictures_ensemble")
    assert tensors.input_types == {"IMAGE": "BYTES"}
    _, (scores,) = client.infer(
        "pictures_ensemble", tensors, {"IMAGE": np.array([[data] for data in encoded], dtype=object)}
    )
    from polygraphy.comparator import RunResults

    expected = RunResults.load(str(project / "build/pictures/reference.json"))["pytorch-fp32"][0]["OUTPUT__0"][:3]
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    narrow = io.BytesIO()
    Image.new("L", (1, 60000)).save(narrow, "PNG")
    for picture, message in (
        (b"GIF89a, or so", "picture 2 of 2: expected a picture in JPEG or PNG, found another content"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "picture 2 of 2: expected a picture in JPEG or PNG, found another content"),
        (narrow.getvalue(), "picture 2 of 2: expected a picture with sides of at most 100 to 1, found 1 x 60000"),
    ):
        started = time.perf_counter()
        with pytest.raises(UserError, match=message):
            client.infer("pictures_ensemble", tensors, {"IMAGE": np.array([[encoded[0]], [picture]], dtype=object)})
        assert time.perf_counter() - started < 2
    _, (again,) = client.infer("pictures_ensemble", tensors, {"IMAGE": np.array([[encoded[0]]], dtype=object)})
    np.testing.assert_allclose(again, scores[:1], rtol=1e-4)


def test_the_server_reports_the_provenance_of_what_it_serves(project_with: CopyOf, serving: Serving) -> None:
    project = project_with("plain")
    server, client = serving(project)
    assert server.load("plain_onnx") is None
    parameters = {key: value["string_value"] for key, value in client.config("plain_onnx")["parameters"].items()}
    import hashlib

    def sha256(path: str) -> str:
        return hashlib.sha256((project / path).read_bytes()).hexdigest()

    assert parameters["provenance.1.build"] == sha256("build/plain/model.onnx")
    assert parameters["provenance.1.weights"] == sha256("build/plain/weights.safetensors")
    assert len(parameters["provenance.1.spec"]) == 64
    assert {word.split()[0] for word in parameters["provenance.1.tools"].split(", ")} >= {
        "torch",
        "onnx",
        "onnxruntime",
    }


def write_weights(project: Project, name: str, seed: int) -> None:
    """Replace the weights of a model by random ones."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    torch.manual_seed(seed)
    layers = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "head": nn.Linear(5, 4)})
    save_file(layers.state_dict(), project / f"models/{name}/weights.safetensors")


@pytest.mark.parametrize("provenance", [pytest.param(True, marks=pytest.mark.long), False])
def test_a_new_version_does_not_disturb_the_one_that_is_served(
    project_with: CopyOf, serving: Serving, provenance: bool
) -> None:
    """A thread sends requests to version 1 while version 2 is built, published and loaded."""
    project = project_with("versions")
    if not provenance:
        project.edit("models/versions/model.toml", "keep_versions = 3", "keep_versions = 3\nprovenance = false")
    project.edit("models/versions/model.toml", "[1]", "[1, 2]")
    project.edit("models/versions/model.toml", "version_policy", "# version_policy")
    project.built()
    server, client = serving(project)
    assert server.load("versions_onnx") is None
    tensors = client.tensors("versions_onnx")
    batch = np.random.default_rng(0).random((2, 3, 16, 16), np.float32)
    first = client.infer("versions_onnx", tensors, {"INPUT__0": batch})[1][0]
    inode = os.stat("model_repository/versions_onnx/1/model.onnx")

    failures, answers, stop = [], [], threading.Event()

    def send_requests() -> None:
        import tritonclient.grpc as grpc

        version_1 = grpc.InferenceServerClient(server.grpc)
        tensor = grpc.InferInput("INPUT__0", [2, 3, 16, 16], "FP32")
        tensor.set_data_from_numpy(batch)
        while not stop.is_set():
            try:
                answer = version_1.infer("versions_onnx", [tensor], model_version="1")
                answers.append(np.array_equal(answer.as_numpy("OUTPUT__0"), first))
            except Exception as error:
                failures.append(str(error))

    thread = threading.Thread(target=send_requests)
    thread.start()
    try:
        write_weights(project, "versions", seed=2)
        assert "versions: 1, 2" in project.built().out
        assert server.load("versions_onnx") is None
        version, (second,) = client.infer("versions_onnx", tensors, {"INPUT__0": batch})
        assert version == "2"
        assert not np.array_equal(second, first)
        before = len(answers)
        while len(answers) < before + 20:
            assert thread.is_alive()
    finally:
        stop.set()
        thread.join()
    assert not failures
    assert len(answers) > 50
    assert all(answers), "version 1 answers as before"
    now = os.stat("model_repository/versions_onnx/1/model.onnx")
    assert (now.st_ino, now.st_ctime_ns) == (inode.st_ino, inode.st_ctime_ns), "its files were not touched"
    log = Path("build/test.log").read_text()
    reloaded = log.count("successfully loaded 'versions_onnx'")
    # Version 1 is loaded again, since a file beside config.pbtxt has changed: the manifest, if not config.pbtxt itself.
    assert log.count("TRITONBACKEND_ModelInstanceInitialize: versions_onnx") == 3, reloaded


def test_the_oldest_version_goes_when_there_are_too_many(project_with: CopyOf) -> None:
    project = project_with("versions")
    project.edit("models/versions/model.toml", "version_policy", "# version_policy")
    project.built()
    for seed in (2, 3, 4):
        write_weights(project, "versions", seed)
        project.built()
    folder = project / "model_repository/versions"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["2", "3", "4"]
    parameters = text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig()).parameters
    builds = {key: parameters[key].string_value for key in parameters if key.endswith(".build")}
    assert set(builds) == {f"provenance.{version}.build" for version in (2, 3, 4)}
    assert len(set(builds.values())) == 3
    provenance = read_provenance(str(folder / "3"))
    assert provenance is not None
    assert provenance["build"] == builds["provenance.3.build"]
    assert project.built().ran == []
    (folder / "3/model.pt").write_bytes(b"damaged")
    assert "dropped: 3, because of other tensors or of changed files" in project.built().out
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["2", "4"]


def test_versions_with_other_tensors_are_not_kept_under_one_config(project_with: CopyOf) -> None:
    project = project_with("versions")
    project.edit("models/versions/model.toml", "version_policy", "# version_policy")
    project.edit("models/versions/model.toml", "shape = [3, 16, 16]", "shape = [3, 16, 20]")
    run = project.built()
    assert "versions: 2, dropped: 1, because of other tensors" in run.out
    folders = [path.name for path in (project / "model_repository/versions").iterdir() if path.is_dir()]
    assert folders == ["2"]


def test_a_version_that_a_policy_names_must_be_there(project_with: CopyOf) -> None:
    project = project_with("versions")
    before = project.tree()
    project.edit("models/versions/model.toml", "versions = [1]", "versions = [1, 7]")
    run = project.doit()
    assert run.code == 1
    assert "triton.version_policy.specific: version 7 is not published, only 1" in run.out
    assert {k: v for k, v in project.tree().items() if k.startswith("versions_onnx")} == {
        k: v for k, v in before.items() if k.startswith("versions_onnx")
    }


def smoke(project: Project, server: triton_server.Server, *more: str) -> tuple[int, str]:
    run = project.doit("smoke", "--url", server.http, "--grpc", server.grpc, *more)
    return run.code, run.out


def test_smoke_judges_a_running_server_by_the_gate(project_with: CopyOf, serving: Serving) -> None:
    project = project_with("pictures")
    server, _ = serving(project)
    for name in ("pictures_onnx", "pictures_ensemble"):
        assert server.load(name) is None
    code, out = smoke(project, server)
    assert code == 0, out
    rows = [line.split() for line in out.splitlines() if re.match(" pictures.* ms ", line)]
    assert sorted((row[0], row[1], row[-1]) for row in rows) == [
        (name, protocol, "ok")
        for name in ("pictures_ensemble", "pictures_onnx", "pictures_preprocess")
        for protocol in ("HTTP", "gRPC")
    ]
    assert all(row[-2] == "ms" for row in rows), "the last column before the result is a latency"

    write_weights(project, "pictures", seed=2)  # the server still has the old weights
    project.built()
    code, out = smoke(project, server, "--model", "pictures_onnx")
    assert code == 1
    assert "pictures_onnx (HTTP): output OUTPUT__0: " in out
    project.edit("models/pictures/model.toml", 'source = "weights', '# as before\nsource = "weights')
    code, out = smoke(project, server, "--model", "pictures_preprocess")
    assert code == 0, "the preprocessing did not change"


def test_smoke_detects_a_build_that_is_not_the_newest(project_with: CopyOf, serving: Serving) -> None:
    project = project_with("plain")
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
    assert "plain (HTTP): the server has not loaded it" in out


@pytest.mark.parametrize("protocol", triton_client.PROTOCOLS)
def test_a_program_that_never_answers_is_no_server(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections, as a hung server or another program does."""
    monkeypatch.setattr(triton_client, "PROBE_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"^{url} does not answer {protocol} within 0\.5 s; is it Triton's port"):
            triton_client.require_server(protocol, url)


def test_smoke_without_a_server_says_how_to_start_one(project_with: CopyOf) -> None:
    project = project_with("plain")
    port = triton_server.free_ports().http
    run = project.doit("smoke", "--url", f"127.0.0.1:{port}")
    assert run.code == 1
    assert f"nothing answers HTTP at 127.0.0.1:{port}" in run.out
    assert "`doit serve` starts a server" in run.out
    assert "expected host:port, found 'nonsense'" in project.doit("smoke", "--url", "nonsense").out
    assert "has no model 'nope' of the specs" in project.doit("smoke", "--model", "nope").out


@pytest.mark.parametrize("name", ["pictures_ensemble", "pictures_onnx", "from_bytes_onnx", "plain", "fixed_onnx"])
def test_the_examples_of_clients_run_as_they_stand(all_models: Project, serving: Serving, name: str) -> None:
    server, _ = serving(all_models)
    assert server.load(name) is None
    model = name.removesuffix("_ensemble").removesuffix("_onnx")
    folder = all_models / f"build/{model}/clients/{name}"
    outputs = []
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
        outputs.append(run.stdout)
        body = script.read_text().split('"""')[2]
        lines = 43 if name == "fixed_onnx" else 38  # a fixed batch takes several requests, the last one filled up
        assert len([line for line in body.splitlines() if line.strip()]) <= lines
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith(str(PICTURE))
    if name.startswith("pictures"):
        assert {line.split()[1] for line in outputs[0].splitlines()[1:5]} == {"one", "two", "three", "four"}


@pytest.mark.parametrize(
    ("number", "code", "last"), [(signal.SIGTERM, 143, "interrupted by SIGTERM"), (signal.SIGINT, 0, "stopped\n")]
)
def test_serve_runs_until_a_signal(number: signal.Signals, code: int, last: str, project_with: CopyOf) -> None:
    """Ctrl-C is its normal end."""
    project = project_with("plain")
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
        assert lines.index("starting Triton (core); log: build/serve.log\n") < lines.index("  plain: ok\n")
        assert Client("gRPC", f"127.0.0.1:{ports.grpc}").ready("plain_onnx")
        process.send_signal(number)
        assert process.wait(60) == code
        assert last in process.stdout.read()
    with pytest.raises(UserError, match="nothing answers"):
        Client("HTTP", f"127.0.0.1:{ports.http}").ready("plain")
