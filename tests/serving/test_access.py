"""Who can make a server load code: requests to the servers that are started here, and bytecode in a published model.

The attacks are real, against the server's core from PyPI. It stands for a `tritonserver` on the PATH and for the one in
NVIDIA's image, too: only Docker itself is replaced.
"""

import base64
import contextlib
import http.client
import importlib.util
import json
import os
import py_compile
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from build_tasks.errors import UserError
from build_tasks.serving import server_kinds, triton_core, triton_server
from build_tasks.serving.server_kinds import KINDS
from build_tasks.serving.triton_client import KEY_HEADERS, Client
from build_tasks.serving.triton_server import Ports
from tests.support import specs_served
from tests.support.project import Project

MODELS = ("plain", "plain_onnx", "pictures_onnx", "pictures_preprocess", "pictures_ensemble")

# A Python model that writes a file when it is loaded.
CODE = """\
import pathlib

pathlib.Path({marker!r}).write_text("code ran")


class TritonPythonModel:
    def execute(self, requests):
        return []
"""

TENSOR = {"data_type": "TYPE_FP32", "dims": [1]}
CONFIG = json.dumps({"backend": "python", "input": [{"name": "X", **TENSOR}], "output": [{"name": "Y", **TENSOR}]})

# Runs the core as NVIDIA's image runs Triton. `docker version` and `docker image inspect` succeed.
DOCKER = """\
#!{python}
import os, re, sys

_, command, *arguments = sys.argv
if command != "run":
    sys.exit()
values = {{option: [b for a, b in zip(arguments, arguments[1:]) if a == option] for option in ("--env", "--publish")}}
os.environ.update(value.split("=", 1) for value in values["--env"])
(repository,) = [argument.removesuffix(":/models:ro") for argument in arguments if argument.endswith(":/models:ro")]
script = arguments[-1].replace("/models", repository)
for name, mapping in zip(("http", "grpc", "metrics"), values["--publish"], strict=True):
    address, port, _ = mapping.split(":")
    script += f" --{{name}}-address={{address}} --{{name}}-port={{port}}"
os.execvp("bash", ["bash", "-c", script])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with the server's core and three models, built."""
    project = Project(tmp_path_factory.mktemp("access") / "project")
    for name in ("plain", "pictures", "versions"):
        spec = specs_served.add(project, name) / "model.toml"
        # The release of the core: with --server local and docker, it is given all fields of the release.
        table = "" if "\n[triton]\n" in spec.read_text() else "[triton]\n"
        text = spec.read_text() + table
        spec.write_text(text.replace("[triton]\n", f'[triton]\nrelease = "{triton_core.RELEASE}"\n'))
    project.built()
    project.built("tritonserver")
    return project


@pytest.fixture
def copy(built: Project, tmp_path: Path) -> Project:
    """A copy of the project. A symbolic link shares the core."""
    copy = built.copy(tmp_path / "copy", ignore=shutil.ignore_patterns(".tritonserver"))
    (copy / "build/.tritonserver").symlink_to(built / "build/.tritonserver")
    return copy


@pytest.fixture
def installed(built: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Puts a `tritonserver` and a `docker` on the PATH, which run the core, and a `pip` that does nothing."""
    monkeypatch.chdir(built.root)
    with triton_core.backend_directory(stubs=True) as backends:
        variables = "".join(f"export {name}='{value}'\n" for name, value in triton_core.environment().items())
        programs = {
            "tritonserver": f'#!/bin/sh\n{variables}exec {triton_core.executable()} "$@" '
            f"--backend-directory={backends} --allow-gpu-metrics=false\n",
            "docker": DOCKER.format(python=sys.executable),
            "pip": "#!/bin/sh\n",
        }
        for name, text in programs.items():
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        yield


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., triton_server.Server]]:
    """Starts the core over a project."""
    with contextlib.ExitStack() as running:

        def start_core(project: Project, kind: str = "core") -> triton_server.Server:
            monkeypatch.chdir(project.root)
            ports = triton_server.free_ports()
            return running.enter_context(triton_server.start(kind, "26.08", ports, "build/test.log", stubs=True))

        yield start_core


def post(url: str, path: str, body: str = "", **headers: str) -> tuple[int, str]:
    """Send a request as a page of another origin can send it from a browser: text, which needs no permission."""
    origin = {"Content-Type": "text/plain", "Origin": "http://attacker.example"}
    with contextlib.closing(http.client.HTTPConnection(url, timeout=60)) as connection:
        connection.request("POST", path, body, {**origin, **headers})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def attack(protocol: str, url: str, marker: Path, key: str = "") -> str:
    """Load a Python model whose code is in the request. Returns the server's error, empty if it loaded the model."""
    code = CODE.format(marker=str(marker)).encode()
    headers = {KEY_HEADERS[protocol]: key} if key else {}
    if protocol == "HTTP":
        parameters = {"config": CONFIG, "file:1/model.py": base64.b64encode(code).decode()}
        status, error = post(url, "/v2/repository/models/evil/load", json.dumps({"parameters": parameters}), **headers)
        return f"{status} {error}" if status != 200 else ""
    import tritonclient.grpc as grpc

    try:
        client = grpc.InferenceServerClient(url)
        client.load_model("evil", headers=headers, config=CONFIG, files={"file:1/model.py": code})
    except grpc.InferenceServerException as error:
        return f"{error.status()} {error.message()}"
    return ""


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "auto"])
def test_a_request_cannot_bring_code(
    built: Project, start: Callable[..., triton_server.Server], tmp_path: Path, kind: str
) -> None:
    server = start(built, kind)
    marker = tmp_path / "marker"
    for key in ("", "guessed"):
        assert attack("HTTP", server.http, marker, key).startswith("403 "), "refused"
        assert attack("gRPC", server.grpc, marker, key).startswith("StatusCode.UNAVAILABLE "), "refused"
    assert not marker.exists()
    for name in MODELS:
        assert server.load(name) is None, "the models of the repository load"
    assert attack("HTTP", server.http, marker).startswith("403 ")
    assert not marker.exists()
    for protocol, url in (("HTTP", server.http), ("gRPC", server.grpc)):
        assert Client(protocol, url).ready("plain")
        assert not Client(protocol, url).ready("evil")
        assert Client(protocol, url, key=server.key).load("plain") is None, "this project's client has the key"
    assert attack("gRPC", server.grpc, marker, server.key) == ""
    assert marker.read_text() == "code ran", "with the key, the same request does run code: the attack is a real one"
    assert server.key not in Path("build/test.log").read_text()


def test_no_request_changes_the_server_or_maps_memory(
    built: Project, start: Callable[..., triton_server.Server]
) -> None:
    import tritonclient.grpc as grpc

    server = start(built)
    for path, body in (
        ("/v2/repository/index", ""),
        ("/v2/repository/models/plain/unload", ""),
        ("/v2/logging", '{"log_verbose_level": 1}'),
        ("/v2/trace/setting", '{"trace_level": ["TIMESTAMPS"]}'),
        ("/v2/systemsharedmemory/region/x/register", '{"key": "/x", "offset": 0, "byte_size": 8}'),
        ("/v2/cudasharedmemory/unregister", ""),
    ):
        status, error = post(server.http, path, body)
        assert (status, "This API is restricted" in error) == (403, True), path
    client: Any = grpc.InferenceServerClient(server.grpc)
    for method, arguments in (
        ("get_model_repository_index", ()),
        ("unload_model", ("plain",)),
        ("update_log_settings", ({"log_verbose_level": 1},)),
        ("update_trace_settings", (None, {"trace_level": ["TIMESTAMPS"]})),
        ("register_system_shared_memory", ("x", "/x", 8)),
        ("unregister_cuda_shared_memory", ()),
    ):
        with pytest.raises(grpc.InferenceServerException, match="This protocol is restricted"):
            getattr(client, method)(*arguments)


def listening_addresses(port: int) -> set[str]:
    """The addresses of this machine on which something listens at a port."""
    addresses = set()
    for family, table in ((socket.AF_INET, "/proc/net/tcp"), (socket.AF_INET6, "/proc/net/tcp6")):
        for line in Path(table).read_text().splitlines()[1:]:
            (address, number), state = line.split()[1].split(":"), line.split()[3]
            if int(number, 16) == port and state == "0A":
                words = b"".join(bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8))
                addresses.add(socket.inet_ntop(family, words).removeprefix("::ffff:"))
    return addresses


def key_of_server(http_port: int) -> str:
    """The key of the server at a port, from its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            arguments = path.read_text().split("\0")
            if f"--http-port={http_port}" in arguments:
                (option,) = [argument for argument in arguments if argument.startswith("--http-restricted-api=")]
                return option.rpartition("=")[2]
    raise AssertionError("no such server")


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost"])
def test_serve_listens_on_the_loopback_address_and_keeps_its_key(copy: Project, tmp_path: Path, address: str) -> None:
    """Also where the environment asks for the port of Vertex AI, on which Triton listens on all addresses."""
    ports = triton_server.free_ports()
    vertex = {"AIP_MODE": "PREDICTION", "AIP_HTTP_PORT": str(triton_server.free_ports().http)}
    vertex |= {"AIP_PREDICT_ROUTE": "/predict", "AIP_HEALTH_ROUTE": "/health"}
    options = [word for name, port in ports._asdict().items() for word in (f"--{name}", str(port))]
    with copy.start("serve", "--server", "core", "--address", address, *options, **vertex) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("serving:"):
                break
        try:
            assert {line.strip() for line in lines} >= {f"{name}: ok" for name in MODELS}
            assert all(listening_addresses(port) == {"127.0.0.1"} for port in ports)
            assert not listening_addresses(int(vertex["AIP_HTTP_PORT"]))
            marker = tmp_path / "marker"
            assert attack("HTTP", f"127.0.0.1:{ports.http}", marker).startswith("403 ")
            assert attack("gRPC", f"127.0.0.1:{ports.grpc}", marker).startswith("StatusCode.UNAVAILABLE ")
            assert not marker.exists()
            key = key_of_server(ports.http)
        finally:
            process.terminate()
    assert len(key) == 64
    assert key not in "".join(lines) + (copy / "build/serve.log").read_text()
    assert not [path for path in (copy / "build").rglob("*.sqlite3") if key.encode() in path.read_bytes()]


@pytest.mark.parametrize("address", ["0.0.0.0", "192.0.2.1"])
def test_a_release_with_known_holes_listens_on_the_loopback_address_only(copy: Project, address: str) -> None:
    run = copy.doit("serve", "--server", "core", "--address", address)
    assert run.code == 1
    (line,) = [line for line in run.out.splitlines() if "--address" in line]
    assert f"--address {address}: Triton 24.10 has holes that need no login, fixed in 25.07" in line
    assert len(line) <= 300
    assert not (copy / "build/serve.log").exists(), "no server was started"
    with pytest.raises(UserError, match=re.escape(f"--address {address}: Triton 25.06 has holes")):
        server_kinds.bind_address("docker", "25.06", address)
    assert server_kinds.bind_address("docker", "25.07", address) == address


@pytest.mark.parametrize("address", ["example.com", "::1", "127.0.0.1/8", "127.0.0.1:8000", "x" * 1000])
def test_an_address_that_triton_does_not_take_is_refused(copy: Project, address: str) -> None:
    run = copy.doit("serve", "--server", "core", "--address", address)
    assert run.code == 1
    (line,) = [line for line in run.out.splitlines() if "--address" in line]
    assert f"--address: expected an IPv4 address, such as 127.0.0.1, found '{address[:80]}'" in line
    assert len(line) <= 300


@pytest.mark.usefixtures("installed")
def test_a_release_that_cannot_protect_its_port_is_not_started() -> None:
    with (
        pytest.raises(UserError, match=r"Triton 23\.10 cannot protect its HTTP port"),
        triton_server.start("docker", "23.10", Ports(), "build/test.log"),
    ):
        pass


# Bytecode beside a published Python model.


def plant(version: Path, marker: Path) -> None:
    """Put bytecode into the version of a Python model, compiled from a file with the mtime and size of its model.py.

    Python takes it for the bytecode of model.py. It writes a file when it runs.
    """
    model, source = version / "model.py", marker.with_name("other.py")
    source.write_text(f"{CODE.format(marker=str(marker))}#".ljust(model.stat().st_size))
    shutil.copystat(model, source)
    bytecode = Path(importlib.util.cache_from_source(str(model)))
    if bytecode.parent.is_file():
        bytecode.parent.unlink()
    py_compile.compile(str(source), str(bytecode), doraise=True)


def test_planted_bytecode_is_damage(copy: Project, start: Callable[..., triton_server.Server], tmp_path: Path) -> None:
    version = copy / "model_repository/pictures_preprocess/1"
    marker = tmp_path / "marker"
    before = copy.tree()
    plant(version, marker)
    start(copy).load("pictures_preprocess")
    assert marker.read_text() == "code ran", "a server runs the bytecode, although model.py is as it was"
    assert (version / "model.py").read_bytes() == before["pictures_preprocess/1/model.py"]
    assert copy.plan()["to run"] == ["publish:pictures_preprocess"]
    assert copy.built().ran == ["publish:pictures_preprocess"]
    assert copy.tree() == before
    marker.unlink()
    assert start(copy).load("pictures_preprocess") is None
    assert not marker.exists()
    assert copy.built().ran == []


def test_planted_bytecode_is_damage_in_a_version_that_is_kept(copy: Project, tmp_path: Path) -> None:
    """The version stays, without the bytecode: one in a Python model, and one beside an ONNX file."""
    before = copy.tree()
    assert "versions_preprocess/1/__pycache__" in before
    plant(copy / "model_repository/versions_preprocess/1", tmp_path / "marker")
    (copy / "model_repository/versions_onnx/1/__pycache__").mkdir()
    (copy / "model_repository/versions_onnx/1/__pycache__/model.pyc").write_bytes(b"bytecode")
    assert copy.built().ran == ["publish:versions_onnx", "publish:versions_preprocess"]
    assert copy.tree() == before
    (copy / "model_repository/versions_preprocess/1/__pycache__").write_bytes(b"not empty")
    assert copy.built().ran == ["publish:versions_preprocess"]
    assert copy.tree() == before
    assert copy.built().ran == []


@pytest.mark.parametrize("blocked", [True, False])
def test_a_server_of_ones_own_causes_no_rebuild(
    copy: Project, start: Callable[..., triton_server.Server], monkeypatch: pytest.MonkeyPatch, blocked: bool
) -> None:
    """Its Python may write bytecode, and cannot, because a file stands in place of the folder.

    Without that file, as in a model that an older version published, doit publishes the model once more.
    """
    monkeypatch.setattr(triton_server, "ENVIRONMENT", {})
    core = copy / "build/.tritonserver"
    original = core.resolve()
    core.unlink()
    shutil.copytree(original / "python", core / "python", symlinks=True)
    (core / "package").symlink_to(original / "package")
    (paths,) = (core / "python").rglob("package.pth")
    paths.write_text(f"{original}/package\n")  # without the line that turns bytecode off
    bytecode = copy / "model_repository/pictures_preprocess/1/__pycache__"
    before = copy.tree()
    if not blocked:
        bytecode.unlink()
    assert start(copy).load("pictures_preprocess") is None
    assert bytecode.is_dir() != blocked
    assert copy.built().ran == ([] if blocked else ["publish:pictures_preprocess"])
    assert copy.tree() == before
    assert start(copy).load("pictures_preprocess") is None
    assert copy.built().ran == []


def test_servers_that_are_started_here_write_no_bytecode(
    copy: Project, start: Callable[..., triton_server.Server], tmp_path: Path
) -> None:
    """Nor beside a Python model that somebody wrote by hand."""
    folder = copy / "model_repository/by_hand"
    (folder / "1").mkdir(parents=True)
    (folder / "1/model.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    tensors = 'input { name: "X" data_type: TYPE_FP32 dims: 1 } output { name: "Y" data_type: TYPE_FP32 dims: 1 }'
    (folder / "config.pbtxt").write_text(f'name: "by_hand" backend: "python" {tensors}\n')
    start(copy).load("by_hand")
    assert (tmp_path / "marker").exists(), "the model was loaded"
    assert not (folder / "1/__pycache__").exists()
    command = triton_server.launch("docker", "26.08", Ports(), "127.0.0.1", None, "key").command
    assert "PYTHONDONTWRITEBYTECODE=1" in command
    assert f"{copy.root}/model_repository:/models:ro" in command
