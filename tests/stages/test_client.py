"""The template of the example clients. tests/serving runs the clients against a server."""

import ast
import contextlib
import http.server
import itertools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from build_tasks.stages import client
from build_tasks.tensors import TensorSignature
from build_tasks.triton.preprocess_model import preprocessing


def tensor(name: str, dtype: str, *shape: int) -> TensorSignature:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


SCORES = [tensor("OUTPUT__0", "float32", -1, 10)]
RANKED = [tensor("OUTPUT__0", "float32", -1, 3), tensor("OUTPUT__1", "int64", -1, 3)]
FEATURES = [tensor("OUTPUT__0", "float32", -1, 8, 7, 7)]
INPUTS = {
    "encoded images": [[tensor("IMAGE", "bytes", -1, 1)]],
    "preprocessed images": [
        [tensor("INPUT__0", "float32", -1, 3, 64, 64)],
        [tensor("INPUT__0", "float16", 4, 3, 64, 64)],
        [tensor("INPUT__0", "uint8", -1, 64, 64, 3)],
    ],
    "an array": [
        [tensor("INPUT__0", "float32", -1, 1, 28, 28)],
        [tensor("INPUT__0", "float32", 2, 1, 28, 28)],
        [tensor("INPUT__0", "int64", -1, 1)],
        [tensor("INPUT__0", "string", -1, 4)],
        [tensor("INPUT__0", "int64", 1, -1)],
    ],
    "arrays": [
        [tensor("ids", "int64", -1, -1), tensor("mask", "bool", -1, -1)],
        [tensor("image", "float32", 2, 3, 8, 8), tensor("scale", "float64", 2)],
    ],
    "images and arrays": [
        [tensor("image", "float32", -1, 3, 8, 8), tensor("vector", "float32", -1, 5), tensor("words", "string", -1, 1)],
        [tensor("ids", "int64", 4, 7), tensor("url", "uint8", 4, 8, 8, 3)],
        [tensor("image", "float32", -1, 3, 8, 8), tensor("other", "float16", -1, 1, 8, 8)],
    ],
}
PICTURES = ("IMAGE", "INPUT__0", "image", "other", "url")  # names of the inputs above that are pictures
SETTINGS: dict[str, Any] = {
    **{"name": "tiny", "top_k": None, "sequences": False, "classes": True, "by_name": False, "ragged": False},
    "whole": False,
}


def pictures(sends: str, tensors: list[TensorSignature], files: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """Return the endings of files for each input that is a picture."""
    return {each["name"]: files for each in tensors if "images" in sends and each["name"] in PICTURES}


SINGLES: tuple[dict[str, bool], ...] = ({}, {"sequences": True}, {"ragged": True})  # requests of one sample each
OUTPUTS = [(SCORES, None), (RANKED, 3), (FEATURES, None)]


@pytest.fixture(scope="module")
def clients() -> list[str]:
    """The text of every kind of client."""
    kinds = [(sends, image) for sends, images in INPUTS.items() for image in images]
    return [
        client.render(
            protocol,
            {**SETTINGS, "top_k": top_k, **singles, "by_name": sends == "images and arrays"},
            image,
            outputs,
            sends,
            pictures(sends, image, files),
            labels=labels,
        )
        for protocol, (sends, image), (outputs, top_k), labels, singles, files in itertools.product(
            client.PORTS,
            kinds,
            OUTPUTS,
            (False, True),
            SINGLES,
            ((), ("_a.png", "_b.png")),
        )
    ]


def test_every_kind_of_client_is_formatted_python_without_unused_imports(clients: list[str], tmp_path: Path) -> None:
    for index, text in enumerate(clients):
        (tmp_path / f"client{index}.py").write_text(text)
    ruff = [sys.executable, "-m", "ruff"]
    rules = ["--isolated", "--line-length=120", str(tmp_path)]
    for command in ([*ruff, "check", "--select=E,F,I,N,W", *rules], [*ruff, "format", "--check", *rules]):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr


def test_clients_import_what_the_published_preprocessing_has(clients: list[str]) -> None:
    nodes = [node for text in clients for node in ast.walk(ast.parse(text))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "preprocessing"]
    names = {alias.name for node in imports for alias in node.names}
    assert names
    assert {name for name in names if not hasattr(preprocessing, name)} == set()


@pytest.mark.parametrize(("image", "dtype"), [(1, "FP16"), (2, "UINT8")])
def test_a_client_sends_the_dtype_of_the_model(image: int, dtype: str) -> None:
    tensors = INPUTS["preprocessed images"][image]
    text = client.render("grpc", SETTINGS, tensors, SCORES, "preprocessed images", {"INPUT__0": ()}, labels=True)
    assert re.search(rf'triton.InferInput\("INPUT__0", .*, "{dtype}"\)', text)
    assert (".astype(np.float16)" in text) == (dtype == "FP16")
    assert "{labels[index]}" in text


FIXED: dict[str, tuple[list[TensorSignature], dict[str, Any]]] = {
    "an array": ([tensor("x", "int64", 2, -1)], {"x": np.arange(15).reshape(5, 3)}),
    "arrays": (
        [tensor("x", "int64", 2, -1), tensor("y", "float64", 2)],
        {"x": np.arange(15).reshape(5, 3), "y": np.arange(5.0)},
    ),
    "one at a time": ([tensor("x", "int64", 1, -1)], {"x": np.arange(15).reshape(5, 3)}),
    "without a batch": ([tensor("x", "int64", 3)], {"x": np.arange(3)}),
}


@pytest.mark.parametrize("protocol", client.PORTS)
@pytest.mark.parametrize("case", FIXED)
def test_every_sample_is_sent_if_the_batch_is_fixed(case: str, protocol: str, tmp_path: Path) -> None:
    """Five samples for a model of two are three requests, and five answers. A file may be .npz, also of one array."""
    tensors, arrays = FIXED[case]
    sends = "arrays" if len(tensors) > 1 else "an array"
    settings = {**SETTINGS, "whole": case == "without a batch"}
    text = client.render(protocol, settings, tensors, [tensor("sum", "int64", 2)], sends, {}, labels=False)
    (tmp_path / "client.py").write_text(text)
    (tmp_path / "tritonclient").mkdir()
    (tmp_path / "tritonclient/__init__.py").touch()
    (tmp_path / f"tritonclient/{protocol}.py").write_text(FAKE_CLIENT)
    np.savez(tmp_path / "batch.npz", **arrays)

    run = subprocess.run([sys.executable, "client.py", "batch.npz"], cwd=tmp_path, capture_output=True, text=True)

    assert (run.returncode, run.stderr) == (0, "")
    *requests, answer = run.stdout.splitlines()
    if case == "without a batch":
        assert requests == ["[[3]]"]
        return
    assert answer == "sum [ 3 12 21 30 39]"
    one = [2 if case != "one at a time" else 1, 3]
    assert requests == [str([one, [2]] if sends == "arrays" else [one])] * (3 if one[0] == 2 else 5)


# tritonclient without a server: it prints the shapes of a request, and answers with the sum of each sample of x.
FAKE_CLIENT = """\
class InferenceServerException(Exception):
    pass


class InferInput:
    def __init__(self, name, shape, dtype):
        self.name, self.shape = name, shape

    def set_data_from_numpy(self, array):
        assert list(array.shape) == self.shape
        self.array = array


class InferenceServerClient:
    def __init__(self, url):
        pass

    def infer(self, model, inputs):
        print([each.shape for each in inputs])
        return Answer(inputs[0].array)


class Answer:
    def __init__(self, array):
        self.array = array

    def as_numpy(self, name):
        return self.array.reshape(len(self.array), -1).sum(1)
"""


@contextlib.contextmanager
def refusing_server(reason: str) -> Iterator[str]:
    """Context manager of a server that answers every request as Triton does if a model refuses its input."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            body = json.dumps({"error": reason}).encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("sends", ["encoded images", "preprocessed images"])
def test_a_client_says_in_a_line_which_picture_is_refused(tmp_path: Path, sends: str) -> None:
    tensors = INPUTS[sends][0]
    text = client.render("http", SETTINGS, tensors, SCORES, sends, pictures(sends, tensors), labels=False)
    (tmp_path / "http_client.py").write_text(text)
    (tmp_path / "preprocessing.py").write_bytes(Path(preprocessing.__file__).read_bytes())
    settings = {"format": "fp32_nchw", "input_size": [3, 64, 64], "crop_pct": 1.0, "crop_mode": "center"}
    settings |= {"interpolation": "bicubic", "mean": [0.5], "std": [0.5]}
    (tmp_path / "preprocessing.json").write_text(json.dumps(settings))
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
    with refusing_server("picture 1 of 1: expected a picture in JPEG or PNG, found another content") as url:
        command = [sys.executable, "http_client.py", "a.png"]
        environment = {**os.environ, "TRITON_URL": url}
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    where = "[400] picture 1 of 1" if sends == "encoded images" else "a.png"
    assert run.stdout + run.stderr == f"{where}: expected a picture in JPEG or PNG, found another content\n"


@pytest.mark.parametrize(
    ("shape", "dims", "seen"),
    [
        ([-1], [], [-1, 1]),  # one value per sample
        ([2], [], [2]),
        ([-1, 5], [], [-1, 5]),
        ([-1, 3, 4], [12], [-1, 12]),
        ([2, 3, 4], [12], [2, 12]),
        ([1, 3, 32, 32], [3, 32, 32], [3, 32, 32]),  # Triton's quick start: clients send no batch
        ([1, 3, 32, 32], [], [1, 3, 32, 32]),
    ],
)
def test_a_client_sends_what_the_config_says(shape: list[int], dims: list[int], seen: list[int]) -> None:
    x = tensor("x", "float32", *shape)
    assert client.as_clients_see(x, {"x": dims} if dims else {}, batched=True)["shape"] == seen
    assert client.as_clients_see(x, {"x": dims} if dims else {}, batched=False)["shape"] == (seen if dims else shape)


@pytest.mark.parametrize(
    ("protocol", "sends"), [("http", "encoded images"), ("grpc", "preprocessed images"), ("http", "an array")]
)
def test_a_client_says_in_a_line_what_is_wrong(tmp_path: Path, sends: str, protocol: str) -> None:
    tensors = INPUTS[sends][0]
    text = client.render(protocol, SETTINGS, tensors, SCORES, sends, pictures(sends, tensors), labels=False)
    (tmp_path / "client.py").write_text(text)
    (tmp_path / "preprocessing.py").write_bytes(Path(preprocessing.__file__).read_bytes())
    settings = {"format": "fp32_nchw", "input_size": [3, 64, 64], "crop_pct": 1.0, "crop_mode": "center"}
    settings |= {"interpolation": "bicubic", "mean": [0.5], "std": [0.5]}
    (tmp_path / "preprocessing.json").write_text(json.dumps(settings))
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.zeros((2, 1, 28, 28), np.float32))
    existing = "a.npy" if sends == "an array" else "a.png"

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "client.py", *arguments]
        ended = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return ended.returncode, ended.stdout.strip()

    code, text = run("--help")
    assert code == 0
    assert "host:port of the server" in text
    code, text = run()
    assert code == 2
    assert "the following arguments are required" in text.splitlines()[-1]
    code, text = run("nothing.npy" if sends == "an array" else "nothing.png")
    assert code == 1
    assert re.fullmatch(r"nothing\.(png|npy): .*No such file or directory.*", text)
    if sends == "an array":
        np.savez(tmp_path / "a.npz", np.zeros((2, 1, 28, 28), np.float32))
        assert run("a.npz") == (1, "a.npz: expected the array INPUT__0, found arr_0")
        np.save(tmp_path / "b.npy", np.zeros((2, 1, 28, 28)))
        assert run("b.npy") == (1, "b.npy: expected float32, found float64")
    code, text = run("--url", "127.0.0.1:9", existing)
    assert code == 1
    assert re.fullmatch(r".*127\.0\.0\.1:9.*refused.*", text)


def test_a_client_of_pictures_and_arrays_explains_itself(tmp_path: Path) -> None:
    """A user with a picture and a vector needs nothing but --help."""
    tensors = INPUTS["images and arrays"][0][:2]
    settings = {**SETTINGS, "by_name": True}
    text = client.render("http", settings, tensors, SCORES, "images and arrays", {"image": ()}, labels=False)
    assert "python http_client.py --image image.jpg ... --arrays batch.npz\n" in text
    (tmp_path / "http_client.py").write_text(text)
    (tmp_path / "preprocessing.py").write_bytes(Path(preprocessing.__file__).read_bytes())
    picture = {"format": "fp32_nchw", "layout": "nchw", "dtype": "float32", "input_size": [3, 8, 8], "crop_pct": 1.0}
    picture |= {"crop_mode": "center", "interpolation": "bicubic", "mean": [0.5], "std": [0.5], "steps": []}
    (tmp_path / "preprocessing.json").write_text(json.dumps({"image": picture}))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for file, dtype, count in (("one", "float32", 1), ("two", "float32", 2), ("wide", "float64", 1)):
        np.savez(tmp_path / f"{file}.npz", vector=np.zeros((count, 5), dtype))
    np.savez(tmp_path / "other.npz", vectors=np.zeros((1, 5), np.float32))

    def run(*arguments: str, url: str = "127.0.0.1:9") -> tuple[int, str]:
        command = [sys.executable, "http_client.py", "--url", url, *arguments]
        ended = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return ended.returncode, " ".join(ended.stdout.split())

    code, text = run("--help")
    assert code == 0
    assert "--image IMAGE [IMAGE ...] pictures of image, JPEG or PNG" in text
    assert "by name: vector: float32, [-1, 5] (-1: any number)" in text
    assert run("--image", "a.png", "--arrays", "wide.npz") == (1, "wide.npz: vector: expected float32, found float64")
    line = "other.npz: expected the arrays vector, found no vector"
    assert run("--image", "a.png", "--arrays", "other.npz") == (1, line)
    line = "expected as many samples of each input, found 1 of image, 2 of vector"
    assert run("--image", "a.png", "--arrays", "two.npz") == (1, line)
    np.savez(tmp_path / "objects.npz", vector=np.array([[b"x"]], object))
    assert re.match(
        r"objects\.npz: Object arrays cannot be loaded", run("--image", "a.png", "--arrays", "objects.npz")[1]
    )
    with refusing_server("reached") as url:
        assert run("--image", "a.png", "--arrays", "one.npz", url=url) == (1, "[400] reached")


def test_an_input_may_have_the_name_of_another_option(tmp_path: Path) -> None:
    tensors = [tensor("url", "uint8", -1, 8, 8, 3), tensor("n", "float32", -1, 1)]
    settings = {**SETTINGS, "by_name": True}
    text = client.render("http", settings, tensors, FEATURES, "images and arrays", {"url": ()}, labels=False)
    assert 'parser.add_argument("--input-url", dest="input url"' in text
    (tmp_path / "client.py").write_text(text)
    (tmp_path / "preprocessing.py").write_bytes(Path(preprocessing.__file__).read_bytes())
    command = [sys.executable, "client.py", "--url", "here:1", "--input-url", "no.png", "--arrays", "no.npz"]
    (tmp_path / "preprocessing.json").write_text('{"url": {}}')
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    message = "expected a picture in JPEG or PNG that can be read"
    assert (run.returncode, run.stderr) == (1, f"no.png: {message}: No such file or directory\n")
