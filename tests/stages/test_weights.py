"""Sources of weights: files, packages, loopback servers, and the errors of each."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from build_tasks.runtime import limits
from tests.support.hub_server import serving
from tests.support.project import ROOT, Project, Run, add_tiny

SPEC = """\
[architecture]
timm = "test_efficientnet"

[weights]
source = "{source}"
"""
ANOTHER_SHA256 = "0" * 64
COMMIT = "0123456789abcdef0123456789abcdef01234567"

KEY = "classifier.weight"  # of test_efficientnet, with the shape [1000, 256]


def spec(source: object, *more: str) -> str:
    """A spec with these weights; `more` are further lines of [weights]."""
    return SPEC.format(source=source) + "".join(f"{line}\n" for line in more)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def converter(body: str, name: str = "convert") -> str:
    return f"def {name}(state):\n    {body}\n"


@dataclass
class WeightsRun:
    """A run of the weights stage of several models, and the content of build/ after it."""

    project: Project
    run: Run
    build: dict[str, bytes]
    requests: Counter[str] = field(default_factory=Counter)

    def failure(self, model: str) -> str:
        """The one line about the failed weights stage of a model, which must have left no weights."""
        lines: list[str] = re.findall(rf"^✗ weights +{model} +(.*)$", self.run.out, re.MULTILINE)
        assert len(lines) == 1, self.run.out
        assert f"{model}/weights.safetensors" not in self.build
        return lines[0]

    def weights(self, model: str) -> bytes:
        assert f"weights:{model}" in self.run.ran, self.run.out
        return self.build[f"{model}/weights.safetensors"]


def run_weights(project: Project, *arguments: str, **environment: str) -> WeightsRun:
    run = project.doit(*arguments, **{"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment})
    return WeightsRun(project, run, project.tree("build"))


# ---------------------------------------------------------------------------------------------------------------
# Files of this machine


class Malicious:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def add_shards(folder: Path, weights: Path) -> None:
    """Write the weights in two files and an index of them, as the hub's own library does."""
    tensors = load_file(weights)
    names = sorted(tensors)
    parts = {"part-1.safetensors": names[:40], "part-2.safetensors": names[40:]}
    for part, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, folder / part)
    weight_map = {key: part for part, keys in parts.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> WeightsRun:
    """One run with all sources that need no network, valid and invalid ones."""
    import torch

    project = Project(tmp_path_factory.mktemp("local") / "project")
    state = {key: torch.from_numpy(value) for key, value in load_file(tiny_weights).items()}

    shutil.copy(tiny_weights, project.model("plain", spec("weights.safetensors")))
    shutil.copy(tiny_weights, project.model("whole", spec("weights.safetensors", f'sha256 = "{sha256(tiny_weights)}"')))
    wrapped = {"epoch": 7, "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
    torch.save(wrapped, project.model("wrapped", spec("checkpoint.pth")) / "checkpoint.pth")
    for seed, name in ((0, "seed_0"), (0, "seed_0_again"), (1, "seed_1")):
        project.model(name, spec(f"random://{seed}"))
    renamed = converter("return {key.removeprefix('prefix.'): tensor for key, tensor in state.items()}", "rename")
    folder = project.model("converted", spec("prefixed.pth", 'converter = "convert.py:rename"'), convert_py=renamed)
    torch.save({f"prefix.{key}": tensor for key, tensor in state.items()}, folder / "prefixed.pth")
    package = project / "borrowed_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    shutil.copy(tiny_weights, package / "tiny.safetensors")
    project.model("packaged", spec("package://borrowed_weights/tiny.safetensors"))

    torch.save({"epoch": 7, "params_ema": state}, project.model("nested", spec("net.pth")) / "net.pth")
    student = {f"student.{key}": tensor for key, tensor in state.items()}
    torch.save({**student, "teacher.bias": state["bn1.bias"]}, project.model("offered", spec("net.pth")) / "net.pth")
    folder = project.model("chosen", spec("net.pth", 'prefix = "student."'))
    shutil.copy(project / "models/offered/net.pth", folder)
    add_shards(project.model("sharded", spec("model.safetensors.index.json")), tiny_weights)
    add_shards(project.model("unsharded", spec("model.safetensors.index.json")), tiny_weights)
    (project / "models/unsharded/part-2.safetensors").unlink()
    broken = {key: value.copy() for key, value in load_file(tiny_weights).items()}
    broken["bn1.bias"][0] = float("nan")
    save_file(broken, project.model("unfinite", spec("weights.safetensors")) / "weights.safetensors")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 17\n"
    (project.model("pointer", spec("weights.pth")) / "weights.pth").write_text(pointer)
    torch.save(torch.nn.Linear(1, 1), project.model("classy", spec("network.pth")) / "network.pth")
    torch.jit.script(torch.nn.Linear(1, 1)).save(project.model("script", spec("network.pt")) / "network.pt")

    malicious = pickle.dumps({"state_dict": Malicious(project / "marker")}, protocol=2)
    (project.model("malicious", spec("evil.pth")) / "evil.pth").write_bytes(malicious)
    torch.save(Malicious(project / "marker"), project.model("zipped", spec("evil.pth")) / "evil.pth")
    (project.model("page", spec("weights.pth")) / "weights.pth").write_text("<!DOCTYPE html><title>Log in</title>\n")
    data = tiny_weights.read_bytes()
    (project.model("half", spec("half.safetensors")) / "half.safetensors").write_bytes(data[: len(data) // 2])
    shutil.copy(tiny_weights, project.model("altered", spec("weights.safetensors", f'sha256 = "{ANOTHER_SHA256}"')))
    unfitting = {key: value for key, value in load_file(tiny_weights).items() if key != "conv_stem.weight"}
    unfitting |= {"head.extra": unfitting["classifier.bias"], KEY: unfitting[KEY][:10].copy()}
    save_file(unfitting, project.model("unfitting", spec("weights.safetensors")) / "weights.safetensors")
    project.model("absent", spec("weights.safetensors"))
    shutil.copy(tiny_weights, project.model("unconverted", spec("weights.safetensors", 'converter = "to.py:rename"')))
    project.model("unpackaged", spec("package://no_such_package/tiny.safetensors"))
    project.model("unpacked", spec("package://borrowed_weights/other.safetensors"))
    project.model("offline", spec("hf://owner/repository/model.safetensors@main"))

    home = str(tmp_path_factory.mktemp("home"))
    return run_weights(project, "-n", "2", "weights", HF_HUB_OFFLINE="1", HF_HOME=home)


def test_a_local_safetensors_file_is_taken_as_it_is(local: WeightsRun, tiny_weights: Path) -> None:
    assert local.weights("plain") == tiny_weights.read_bytes()


def test_a_local_file_with_the_right_sha256_is_taken(local: WeightsRun, tiny_weights: Path) -> None:
    assert local.weights("whole") == tiny_weights.read_bytes()


def test_a_wrapped_checkpoint_is_unwrapped(local: WeightsRun, tiny_weights: Path) -> None:
    assert local.weights("wrapped") == tiny_weights.read_bytes()


def test_the_converter_of_the_spec_is_applied(local: WeightsRun, tiny_weights: Path) -> None:
    assert local.weights("converted") == tiny_weights.read_bytes()


def test_a_file_of_a_package_is_taken_without_importing_the_package(local: WeightsRun, tiny_weights: Path) -> None:
    assert local.weights("packaged") == tiny_weights.read_bytes()


def test_random_weights_follow_from_their_seed_alone(local: WeightsRun, tiny_weights: Path) -> None:
    assert local.weights("seed_0") == local.weights("seed_0_again")
    assert local.weights("seed_0") == tiny_weights.read_bytes(), "also in another process and for another model"
    assert local.weights("seed_0") != local.weights("seed_1")


def test_random_weights_are_marked_in_the_run_and_in_the_list(local: WeightsRun) -> None:
    assert re.search(r"^✓ weights +seed_1 .*weights: RANDOM", local.run.out, re.MULTILINE)
    listed = local.project.built("list", "--all").out
    assert re.search(r"^seed_1 .*RANDOM", listed, re.MULTILINE)
    assert re.search(r"^weights:seed_1 .*RANDOM", listed, re.MULTILINE)
    assert not re.search(r"^(weights:)?plain .*RANDOM", listed, re.MULTILINE)


def test_code_in_a_pickle_is_refused_and_not_executed(local: WeightsRun) -> None:
    for model in ("malicious", "zipped"):
        assert local.failure(model) == (
            f"models/{model}/evil.pth wants the class posix.system, and could execute code: save the state_dict() of "
            "the network instead, as safetensors or with torch.save"
        )
    assert not (local.project / "marker").exists()
    pickle.loads(pickle.dumps(Malicious(local.project / "control")))
    assert (local.project / "control").exists(), "pickle itself does run it"


def test_a_nested_dict_that_fits_is_taken_and_said(local: WeightsRun, tiny_weights: Path) -> None:
    assert local.weights("nested") == tiny_weights.read_bytes()
    assert re.search(r"^✓ weights +nested .*taken from: params_ema", local.run.out, re.MULTILINE)


def test_a_prefix_is_offered_and_taken_from_the_spec(local: WeightsRun, tiny_weights: Path) -> None:
    assert local.failure("offered").endswith('set weights.prefix = "student."')
    assert local.weights("chosen") == tiny_weights.read_bytes()


def test_the_shards_of_an_index_are_read_and_watched(local: WeightsRun, tiny_weights: Path) -> None:
    assert local.weights("sharded") == tiny_weights.read_bytes()
    assert "part-2.safetensors does not exist" in local.failure("unsharded")
    add_shards(local.project / "models/sharded", local.project / "build/seed_1/weights.safetensors")
    assert local.project.built("weights:sharded").ran == ["weights:sharded"]
    assert (local.project / "build/sharded/weights.safetensors").read_bytes() == local.weights("seed_1")
    assert local.project.built("weights:sharded").ran == []


def test_the_cause_of_a_refusal_is_named(local: WeightsRun) -> None:
    assert local.failure("unfinite").startswith("weights.safetensors has NaN or infinity in 1 tensors: bn1.bias")
    assert "is a pointer of Git LFS, not the file itself: run `git lfs pull`" in local.failure("pointer")
    assert "wants the class torch.nn.modules.linear.Linear, and could execute code" in local.failure("classy")
    assert "is a TorchScript file, which contains the network too" in local.failure("script")


def test_a_web_page_instead_of_a_checkpoint_is_not_reported_as_code(local: WeightsRun) -> None:
    line = local.failure("page")
    assert line.startswith("models/page/weights.pth cannot be read as weights")
    assert "execute code" not in line


def test_half_a_file_is_refused(local: WeightsRun) -> None:
    assert local.failure("half").startswith("models/half/half.safetensors cannot be read as weights: ")


def test_a_wrong_sha256_of_a_local_file_is_refused(local: WeightsRun, tiny_weights: Path) -> None:
    assert local.failure("altered") == (
        f"models/altered/weights.safetensors has the sha256 {sha256(tiny_weights)}, "
        f"but the spec expects {ANOTHER_SHA256}"
    )


def test_keys_that_do_not_fit_are_listed_by_the_kind_of_mismatch(local: WeightsRun) -> None:
    assert local.failure("unfitting") == (
        "weights.safetensors does not fit the architecture: 1 missing: conv_stem.weight; 1 unexpected: head.extra; "
        f"1 wrongly shaped: {KEY} [10, 256] instead of [1000, 256]"
    )


def test_a_missing_file_of_the_model_is_named_with_its_spec(local: WeightsRun) -> None:
    expected = "{} does not exist; models/{}/model.toml asks for it"
    assert local.failure("absent") == expected.format("models/absent/weights.safetensors", "absent")
    assert local.failure("unconverted") == expected.format("models/unconverted/to.py", "unconverted")


def test_a_missing_package_is_named_with_the_command_that_installs_it(local: WeightsRun) -> None:
    for model, package in (("unpackaged", "no_such_package"), ("unpacked", "borrowed_weights")):
        line = local.failure(model)
        assert f"the package {package} is not installed" in line
        assert line.endswith("pip install -r requirements.txt")


def test_a_model_without_its_file_does_not_stop_the_others(local: WeightsRun) -> None:
    assert local.run.code == 1
    assert {"weights:absent", "weights:unpackaged"} <= set(local.run.failed)
    assert "weights:plain" in local.run.ran


def test_without_the_hub_the_line_says_where_to_put_the_file(local: WeightsRun) -> None:
    line = local.failure("offline")
    source = "hf://owner/repository/model.safetensors@main"
    assert line.startswith(f"{source} cannot be fetched (the Hugging Face hub cannot be reached")
    assert line.endswith("; put the file at models/offline/model.safetensors")


# ---------------------------------------------------------------------------------------------------------------
# Converters with errors


@pytest.fixture(scope="module")
def converters(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> WeightsRun:
    import torch

    project = Project(tmp_path_factory.mktemp("converters") / "project")
    bodies = {
        "raising": "raise KeyError('no such layer')",
        "silent": "state.clear()",
        "odd": "return dict.fromkeys(state, 'not a tensor')",
        "numbered": "return {**state, 1: state['bn1.bias']}",
        "ending": "raise SystemExit('2 arguments expected')",
        "arrays": "return {key: tensor.numpy() for key, tensor in state.items()}",
    }
    for name, body in bodies.items():
        add_tiny(project, tiny_weights, name)
        project.model(name, spec("weights.safetensors", 'converter = "convert.py:convert"'), convert_py=converter(body))
    add_tiny(project, tiny_weights, "nameless")
    folder = project.model("named", spec("net.pth", 'converter = "convert.py:convert"'))
    (folder / "convert.py").write_text(converter("return state['net']"))
    state = {key: torch.from_numpy(value) for key, value in load_file(tiny_weights).items()}
    torch.save({"model": "test_efficientnet", "net": state}, folder / "net.pth")
    halving = converter("return {key: value / 2 for key, value in state.items()}")
    folder = project.model("nested", spec("net.pth", 'converter = "convert.py:convert"'), convert_py=halving)
    torch.save({"net": state, "epoch": 3, 7: "seed"}, folder / "net.pth")
    another = converter("return state", "another")
    project.model("nameless", spec("weights.safetensors", 'converter = "convert.py:convert"'), convert_py=another)
    return run_weights(project, "-n", "2", "weights")


def test_a_converter_that_raises_is_reported_with_its_error_and_place(converters: WeightsRun) -> None:
    assert "KeyError: 'no such layer'" in converters.failure("raising")
    assert re.search(r"models/raising/convert\.py\W+line 2", converters.run.out)


def test_a_missing_function_of_the_converter_is_named(converters: WeightsRun) -> None:
    assert converters.failure("nameless") == "models/nameless/convert.py: there is no function convert"


def test_a_converter_that_returns_no_tensors_is_an_error(converters: WeightsRun) -> None:
    expected = "convert.py:convert must return a dict from keys to tensors, found"
    for name, found in {
        "silent": "NoneType",
        "odd": "str for blocks.0.0.bn1",
        "arrays": "ndarray for blocks.0.0.bn1",
        "numbered": "the key 1, which is no text",
    }.items():
        assert f"{expected} {found}" in converters.failure(name)


def test_a_converter_that_ends_the_process_is_reported(converters: WeightsRun) -> None:
    assert "convert.py, line 2: SystemExit: 2 arguments expected" in converters.failure("ending")


def test_a_converter_that_raises_is_reported_with_what_it_got(converters: WeightsRun) -> None:
    """Also a dict with a key that is no text, as some programs save beside the weights."""
    line = "line 2: TypeError: unsupported operand type(s) for /: 'dict' and 'int'; it got a dict of 3 entries: "
    assert f"{line}net (dict), epoch (int), 7 (str)" in converters.failure("nested")
    assert "; it got a dict of 88 entries: blocks.0.0.bn1.num_batches_tracked (Tensor), " in converters.failure(
        "raising"
    )


def test_a_converter_gets_the_file_if_its_model_is_a_word(converters: WeightsRun, tiny_weights: Path) -> None:
    assert converters.weights("named") == tiny_weights.read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# Servers


class Server(ThreadingHTTPServer):
    """Serves `file` under every path. The first part of the path selects another behavior.

    It implements as much of the Hugging Face hub's resolve endpoint as the hub's own client needs.

    Args:
        file: Content of the file.
        certificate: File with the certificate and key of a server that speaks TLS.
        target: Where it redirects to, if the first part of the path is "moved".
    """

    daemon_threads = True

    def __init__(self, file: bytes, certificate: Path | None = None, target: str = ""):
        super().__init__(("127.0.0.1", 0), Handler)
        self.file = file
        self.target = target
        self.healthy = False
        self.requests: Counter[str] = Counter()  # by the path's first part
        self.lock = threading.Lock()
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server_port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket = context.wrap_socket(self.socket, server_side=True)

    def counted(self, behavior: str) -> int:
        with self.lock:
            self.requests[behavior] += 1
            return self.requests[behavior]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that close the connection."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_CONNECT(self) -> None:
        self.server.counted("CONNECT")
        self.begin(403, 0)

    def answer(self, body: bool) -> None:
        behavior = self.path.split("/")[1]
        count = self.server.counted(behavior)
        file = self.server.file
        if behavior == "busy" and count <= 2:
            self.begin(503, 0)
        elif behavior in ("missing", "api"):  # the hub's client requests /api besides the file
            self.begin(404, 0)
        elif behavior == "missing-entry":
            self.begin(404, 0, {"X-Error-Code": "EntryNotFound"})
        elif behavior == "page" and not self.server.healthy:
            self.begin(200, 15)
            self.wfile.write(b"<!DOCTYPE html>")
        elif behavior == "cut" and not self.server.healthy and body:
            self.begin(200, len(file))
            self.wfile.write(file[: len(file) // 2])  # HTTP/1.0: the connection ends with the answer
        elif behavior == "slow" and body:
            self.begin(200, len(file))
            for start in range(0, len(file), len(file) // 8):
                self.wfile.write(file[start : start + len(file) // 8])
                time.sleep(0.2)
        elif behavior == "cut-hub" and body:
            self.begin(200, len(file))
        elif behavior == "moved":
            self.begin(302, 0, {"Location": f"{self.server.target}/moved-here/{self.path.partition('/')[2]}"})
        elif behavior == "endless":
            self.send_response(200)  # without a length
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 16))
        elif behavior == "drip":
            self.begin(200, len(file))
            with contextlib.suppress(OSError):
                for _ in range(200):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
        elif behavior == "private" and self.headers.get("Authorization") != "Basic dXNlcjpwYXNzd29yZA==":
            self.begin(401, 0)
        elif behavior == "rude":
            self.send_response(404, f"\x1b[31mno {self.path}")
            self.end_headers()
        else:
            self.begin(200, len(file))
            if body:
                self.wfile.write(file)

    def begin(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        hub = {"ETag": f'"{hashlib.sha256(self.server.file).hexdigest()}"', "X-Repo-Commit": COMMIT}
        for key, value in {"Content-Length": str(length), **hub, **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()

    def log_message(self, message: str, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def server(tiny_weights: Path) -> Iterator[Server]:
    """A server without TLS, which stands for the hub."""
    with serving(Server(tiny_weights.read_bytes())) as server:
        yield server


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1, and its key, in one file. Clients trust it as their only authority."""
    file = tmp_path_factory.mktemp("tls") / "server.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", file, "-out", file.with_suffix(".crt")),
        ],
        check=True,
        capture_output=True,
    )
    file.write_bytes(file.read_bytes() + file.with_suffix(".crt").read_bytes())
    return file


@pytest.fixture(scope="module")
def secure(tiny_weights: Path, server: Server, certificate: Path) -> Iterator[Server]:
    """A server with TLS. Its /moved redirects to the server without."""
    with serving(Server(tiny_weights.read_bytes(), certificate, server.url)) as secure:
        yield secure


@pytest.fixture(scope="module")
def trust(certificate: Path) -> dict[str, str]:
    """The environment in which requests trusts the certificate."""
    return {"REQUESTS_CA_BUNDLE": str(certificate)}


DOWNLOADED = ("checked", "plain", "busy", "placed", "cut", "altered", "missing", "page")


@pytest.fixture(scope="module")
def downloads(
    tmp_path_factory: pytest.TempPathFactory, secure: Server, trust: dict[str, str], tiny_weights: Path
) -> WeightsRun:
    """The first run, with a server that fails in many ways."""
    project = Project(tmp_path_factory.mktemp("downloads") / "project")
    digests = {"checked": sha256(tiny_weights), "altered": ANOTHER_SHA256}
    for name in DOWNLOADED:
        more = [f'sha256 = "{digests[name]}"'] if name in digests else []
        project.model(name, spec(f"{secure.url}/{name}/{name}.safetensors?download=true", *more))
    shutil.copy(tiny_weights, project / "models/placed/placed.safetensors")
    project.model("mirrored", spec(f"{secure.url}/mirrored/user@v1/mirrored.safetensors"))
    shutil.copy(tiny_weights, project / "models/mirrored/mirrored.safetensors")
    secure.healthy = False
    secure.requests.clear()
    first = run_weights(project, "-n", "8", "weights", **trust)
    first.requests = secure.requests.copy()
    return first


@pytest.fixture(scope="module")
def downloads_again(downloads: WeightsRun, server: Server, secure: Server, trust: dict[str, str]) -> WeightsRun:
    """The second run, with a healthy server, after one of the downloaded files was damaged."""
    project = downloads.project
    [downloaded] = (project / "build/.downloads").rglob("checked.safetensors")
    data = bytearray(downloaded.read_bytes())
    data[len(data) // 2] ^= 0xFF
    downloaded.write_bytes(data)
    (project / "build/checked/weights.safetensors").unlink()
    project.model("proxied", spec("hf://owner/repository/model.safetensors@main"))
    secure.healthy = True
    secure.requests.clear()
    server.requests.clear()
    proxy = {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": server.url, "https_proxy": server.url}
    home = str(project / "home")
    tasks = [f"weights:{name}" for name in ("plain", "checked", "cut", "page", "proxied")]
    second = run_weights(project, "-n", "8", *tasks, HF_HOME=home, **proxy, **trust)
    second.requests = secure.requests + server.requests
    return second


def test_a_download_becomes_the_weights(downloads: WeightsRun, tiny_weights: Path) -> None:
    assert downloads.weights("plain") == tiny_weights.read_bytes()
    assert downloads.weights("checked") == tiny_weights.read_bytes()
    assert downloads.requests["plain"] == downloads.requests["checked"] == 1


def test_a_busy_server_gets_further_requests(downloads: WeightsRun, tiny_weights: Path) -> None:
    assert downloads.weights("busy") == tiny_weights.read_bytes()
    assert downloads.requests["busy"] == 3


def test_an_answer_that_will_not_change_is_not_requested_again(downloads: WeightsRun) -> None:
    assert downloads.requests["missing"] == 1
    assert downloads.requests["altered"] == 1


@pytest.mark.parametrize("model", ["placed", "mirrored"])
def test_a_file_placed_by_hand_is_used_without_a_request(downloads: WeightsRun, tiny_weights: Path, model: str) -> None:
    assert downloads.weights(model) == tiny_weights.read_bytes()
    assert downloads.requests[model] == 0


@pytest.mark.parametrize("model", ["cut", "missing", "altered"])
def test_a_failed_download_names_its_source_and_where_to_put_the_file(
    downloads: WeightsRun, secure: Server, model: str
) -> None:
    line = downloads.failure(model)
    assert line.startswith(f"{secure.url}/{model}/{model}.safetensors cannot be fetched (")
    assert line.endswith(f"; put the file at models/{model}/{model}.safetensors")


def test_a_wrong_sha256_of_a_download_is_reported_with_both(downloads: WeightsRun, tiny_weights: Path) -> None:
    message = f"it has the sha256 {sha256(tiny_weights)}, but the spec expects {ANOTHER_SHA256}"
    assert message in downloads.failure("altered")


@pytest.mark.parametrize("model", ["cut", "missing", "altered"])
def test_a_failed_download_leaves_no_file_that_could_count_as_whole(downloads: WeightsRun, model: str) -> None:
    assert downloads.requests[model] > 0
    assert not [path for path in downloads.build if path.endswith(f"{model}.safetensors")]


def test_after_a_partial_download_a_run_with_a_healthy_server_succeeds(
    downloads_again: WeightsRun, tiny_weights: Path
) -> None:
    assert downloads_again.weights("cut") == tiny_weights.read_bytes()


def test_a_web_page_instead_of_the_weights_is_not_kept(
    downloads: WeightsRun, downloads_again: WeightsRun, tiny_weights: Path
) -> None:
    failure = downloads.failure("page")
    assert "page/page.safetensors cannot be read as weights: it is a web page" in failure
    assert failure.startswith("https://127.0.0.1:"), failure  # and not a path that no longer exists
    assert failure.endswith("; or put the file at models/page/page.safetensors")
    assert downloads_again.weights("page") == tiny_weights.read_bytes()


def test_a_damaged_download_is_not_used(downloads_again: WeightsRun, tiny_weights: Path) -> None:
    assert downloads_again.weights("checked") == tiny_weights.read_bytes()


def test_what_is_up_to_date_is_not_downloaded_again(downloads_again: WeightsRun) -> None:
    assert "weights:plain" not in downloads_again.run.ran
    assert downloads_again.requests["plain"] == 0


def test_if_a_proxy_refuses_the_hub_the_line_says_where_to_put_the_file(downloads_again: WeightsRun) -> None:
    line = downloads_again.failure("proxied")
    assert downloads_again.requests["CONNECT"] > 0
    assert line.endswith("; put the file at models/proxied/model.safetensors")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, server: Server, tiny_weights: Path) -> WeightsRun:
    """One run with a hub that has some of the files."""
    project = Project(tmp_path_factory.mktemp("hub") / "project")
    project.model("whole", spec("hf://owner/repository/model.safetensors@main"))
    project.model("unpinned", spec("hf://owner/repository/folder/model.safetensors"))
    project.model("timms", spec("timm://test_efficientnet.r160_in1k"))
    project.model("placed", spec("hf://placed/repository/folder/model.safetensors@v1"))
    shutil.copy(tiny_weights, project / "models/placed/model.safetensors")
    project.model("altered", spec("hf://owner/repository/model.safetensors", f'sha256 = "{ANOTHER_SHA256}"'))
    project.model("missing", spec("hf://missing/repository/folder/missing.safetensors@v1"))
    project.model("entry", spec("hf://missing-entry/repository/entry.safetensors"))
    project.model("cut", spec("hf://cut-hub/repository/model.safetensors"))
    project.model("unknown", spec("timm://test_eficientnet"))
    project.model("untagged", spec("timm://test_efficientnet.no_such_tag"))
    server.requests.clear()
    home = str(tmp_path_factory.mktemp("home"))
    found = run_weights(project, "-n", "8", "weights", HF_ENDPOINT=server.url, HF_HOME=home)
    found.requests = server.requests.copy()
    return found


@pytest.mark.parametrize("model", ["whole", "unpinned", "timms"])
def test_a_file_of_the_hub_becomes_the_weights(hub: WeightsRun, tiny_weights: Path, model: str) -> None:
    assert hub.weights(model) == tiny_weights.read_bytes()


def test_with_a_placed_file_the_hub_gets_no_request(hub: WeightsRun, tiny_weights: Path) -> None:
    assert hub.weights("placed") == tiny_weights.read_bytes()
    assert hub.requests["placed"] == 0


def test_a_wrong_sha256_of_a_file_of_the_hub_is_refused(hub: WeightsRun, tiny_weights: Path) -> None:
    assert f"has the sha256 {sha256(tiny_weights)}, but the spec expects {ANOTHER_SHA256}" in hub.failure("altered")


@pytest.mark.parametrize(
    ("model", "source", "file"),
    [
        ("missing", "hf://missing/repository/folder/missing.safetensors@v1", "missing.safetensors"),
        ("entry", "hf://missing-entry/repository/entry.safetensors", "entry.safetensors"),
        ("cut", "hf://cut-hub/repository/model.safetensors", "model.safetensors"),
        ("unknown", "timm://test_eficientnet", "model.safetensors"),
        ("untagged", "timm://test_efficientnet.no_such_tag", "model.safetensors"),
    ],
)
def test_if_the_hub_fails_the_line_says_where_to_put_the_file(
    hub: WeightsRun, model: str, source: str, file: str
) -> None:
    line = hub.failure(model)
    assert line.startswith(f"{source} cannot be fetched (")
    assert line.endswith(f"; put the file at models/{model}/{file}")


def test_the_line_has_the_reason_of_the_hub(hub: WeightsRun) -> None:
    assert "404" in hub.failure("missing")
    assert "Entry Not Found" in hub.failure("entry")


def test_a_hub_that_never_answers_is_given_up_and_not_waited_for_in_silence(tmp_path: Path) -> None:
    """It accepts connections. The hub's client would wait for six minutes."""
    program = (
        "from build_tasks.errors import UserError; from build_tasks.formats import weight_sources\n"
        "weight_sources.HUB_TIMEOUT, weight_sources.ATTEMPTS = 0.2, 2\n"
        "weight_sources.progress.emit = lambda message: print(message.what)\n"
        "try: weight_sources.fetch('tiny', 'hf://owner/model/model.safetensors', '', None)\n"
        "except UserError as error: print(error)"
    )
    with socket.create_server(("127.0.0.1", 0), backlog=20) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", program]
        run = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert "waiting for 127.0.0.1, request 2 of 2\n" in run.stdout
    line = (
        r"hf://owner/model/model\.safetensors cannot be fetched \(127\.0\.0\.1 accepts connections and does not answer"
    )
    assert re.search(rf"{line} within 0\.2 s\); put the file at", run.stdout)


@pytest.mark.parametrize("source", ["{}/slow/model.safetensors", "hf://slow/repository/model.safetensors"])
def test_a_download_shows_its_progress(
    tmp_path: Path, server: Server, secure: Server, trust: dict[str, str], tiny_weights: Path, source: str
) -> None:
    project = Project(tmp_path / "project")
    project.model("tiny", spec(source.format(secure.url)))
    output = project.terminal("weights:tiny", HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=server.url, **trust)
    size = f"{tiny_weights.stat().st_size / 1e6:.1f}"
    assert re.search(rf"model\.safetensors: \d\.\d of {re.escape(size)} MB, \d\.\d MB/s", output)
    assert "✓" in output


def test_a_killed_download_leaves_nothing_after_the_next_one(
    tmp_path: Path, server: Server, tiny_weights: Path
) -> None:
    project = Project(tmp_path / "project")
    expected = f'sha256 = "{sha256(tiny_weights)}"'
    project.model("old", spec(f"{server.url}/slow/old.safetensors", expected))
    for _ in range(2):
        process = project.start("weights:old")
        while not list((project / "build").glob(".downloads/*/tmp*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()
    shutil.rmtree(project / "models/old")
    project.model("other", spec(f"{server.url}/plain/other.safetensors", expected))
    project.built("weights:other")
    assert [path.name for path in (project / "build/.downloads").glob("*/*")] == ["other.safetensors"]


# ---------------------------------------------------------------------------------------------------------------
# Secrets and bounds


def all_bytes(project: Project) -> bytes:
    """All that a run left: artifacts, logs, doit's records, and what was published."""
    return b"".join(content for folder in ("build", "model_repository") for content in project.tree(folder).values())


def test_a_query_is_sent_and_kept_nowhere(
    tmp_path: Path, secure: Server, trust: dict[str, str], tiny_weights: Path
) -> None:
    project = Project(tmp_path / "project")
    text = spec(f"{secure.url}/signed/weights.safetensors?token=4f1c&signature=TOP-SECRET#f")
    project.model("signed", text)
    project.model("rude", spec(f"{secure.url}/rude/weights.safetensors?signature=TOP-SECRET"))
    project.model("lost", spec("https://127.0.0.1:9/weights.safetensors?signature=TOP-SECRET"))
    first = run_weights(project, "weights", **trust)
    assert first.weights("signed") == tiny_weights.read_bytes()
    assert f"weights: {secure.url}/signed/weights.safetensors," in first.run.out
    shown = [
        first.run.out,
        *(project.doit(*words).out for words in (["list", "--all"], ["plan"], ["info", "weights:lost"])),
    ]
    assert not re.search("TOP-SECRET|4f1c", "".join(shown))
    assert b"TOP-SECRET" not in all_bytes(project)
    assert "\x1b" not in first.run.out
    assert first.failure("rude").endswith("; put the file at models/rude/weights.safetensors")
    assert max(len(first.failure(name)) for name in ("rude", "lost")) <= 300

    project.model("signed", text.replace("TOP-SECRET", "ANOTHER"))
    again = run_weights(project, "signed", **trust)
    assert "weights:signed" not in again.run.ran, "the same file under another signature"


def test_a_password_comes_from_netrc(tmp_path: Path, secure: Server, trust: dict[str, str], tiny_weights: Path) -> None:
    project = Project(tmp_path / "project")
    project.model("private", spec(f"{secure.url}/private/weights.safetensors"))
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login user password password\n")
    assert "401" in run_weights(project, "weights", **trust, NETRC=str(tmp_path / "none")).failure("private")
    found = run_weights(project, "weights", **trust, NETRC=str(netrc))
    assert found.weights("private") == tiny_weights.read_bytes()


def test_a_redirect_from_https_to_http_is_refused(
    tmp_path: Path, server: Server, secure: Server, trust: dict[str, str], tiny_weights: Path
) -> None:
    project = Project(tmp_path / "project")
    pin = f'sha256 = "{sha256(tiny_weights)}"'
    project.model("moved", spec(f"{secure.url}/moved/weights.safetensors", pin))
    server.requests.clear()
    line = run_weights(project, "weights", **trust).failure("moved")
    assert f"(the server redirects from https to {server.url}/moved-here/moved/weights.safetensors, which" in line
    assert server.requests["moved-here"] == 0


def test_http_is_allowed_for_a_file_whose_digest_is_known(tmp_path: Path, server: Server, tiny_weights: Path) -> None:
    project = Project(tmp_path / "project")
    project.model("pinned", spec(f"{server.url}/pinned/weights.safetensors", f'sha256 = "{sha256(tiny_weights)}"'))
    assert run_weights(project, "weights").weights("pinned") == tiny_weights.read_bytes()


@pytest.mark.parametrize(
    ("source", "variable", "value", "reason"),
    [
        ("{}/plain/model.safetensors", "SIZE", "0.0001", "it has more than 0.0001 GB"),
        ("{}/endless/model.safetensors", "SIZE", "0.01", "it has more than 0.01 GB"),
        ("{}/drip/model.safetensors", "TIME", "0.02", "it takes longer than 0.02 minutes"),
        ("hf://owner/repository/model.safetensors", "SIZE", "0.0001", "it has more than 0.0001 GB"),
        ("hf://drip/repository/model.safetensors", "TIME", "0.05", "it takes longer than 0.05 minutes"),
    ],
)
def test_the_size_and_the_time_of_a_download_are_bounded(
    tmp_path: Path,
    server: Server,
    secure: Server,
    trust: dict[str, str],
    source: str,
    variable: str,
    value: str,
    reason: str,
) -> None:
    project = Project(tmp_path / "project")
    project.model("m", spec(source.format(secure.url)))
    environment = {f"BUILD_DOWNLOAD_{variable}": value, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    started = time.monotonic()
    line = run_weights(project, "weights", **trust, **environment).failure("m")
    assert f"({reason}, as BUILD_DOWNLOAD_{variable} allows; set it to more, or to 0 for no limit)" in line
    assert line.endswith("; put the file at models/m/model.safetensors")
    assert time.monotonic() - started < 60
    assert not [path for path in project.tree("build") if path.endswith("model.safetensors")]


@pytest.mark.parametrize(("variable", "unit"), [(name, unit) for name, (_, unit) in limits.DEFAULTS.items()])
@pytest.mark.parametrize("value", ["much", "-1", "nan", ""])
def test_a_wrong_bound_is_refused_before_anything_runs(project: Project, variable: str, unit: str, value: str) -> None:
    project.model("m", spec("random://0"))
    run = project.doit("list", **{variable: value})
    assert (run.code, run.out) == (
        3,
        f"ERROR: {variable}: expected a number of {unit}, or 0 for no limit, found {value!r}\n",
    )


# ---------------------------------------------------------------------------------------------------------------
# Every run


@pytest.mark.parametrize("name", ["local", "converters", "downloads", "downloads_again", "hub"])
def test_every_failure_is_one_line_with_exit_code_1_and_no_traceback(name: str, request: pytest.FixtureRequest) -> None:
    found: WeightsRun = request.getfixturevalue(name)
    assert found.run.failed
    for task in found.run.failed:
        found.failure(task.removeprefix("weights:"))
    assert "Traceback" not in found.run.out
    assert found.run.code == 1


@pytest.mark.parametrize("name", ["local", "downloads", "downloads_again", "hub"])
def test_a_run_prints_only_a_line_for_each_start_and_end(name: str, request: pytest.FixtureRequest) -> None:
    """No progress of a download that takes no time, and no warning of a library."""
    found: WeightsRun = request.getfixturevalue(name)
    expected = re.compile(
        r"  weights +\w+ +\.\.\.(, [\d.]+ s last time;)?( build/\S+: missing)?|[✓✗] weights +\w+ .*|"
        r"(\d+ [a-z ]+(, |$))+|skipped: a dependency failed: weights|"
        # of a stage that takes more than ten seconds, on a busy machine
        r"  weights +\w+ +\d\d+\.\d s  (runs|waiting for 127\.0\.0\.1|\S+: [\d.]+ of [\d.]+ MB(, [\d.]+ MB/s)?)"
    )
    assert [line for line in found.run.out.splitlines() if not expected.fullmatch(line)] == []
