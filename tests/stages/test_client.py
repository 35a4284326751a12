"""The template of the example clients. tests/serving runs the clients against a server."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from build_tasks.stages import client
from build_tasks.tensors import TensorSignature
from build_tasks.triton.preprocess_model import preprocessing


def tensor(name: str, dtype: str, *shape: int) -> TensorSignature:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


SCORES = [tensor("OUTPUT__0", "float32", -1, 10)]
RANKED = [tensor("OUTPUT__0", "float32", -1, 3), tensor("OUTPUT__1", "int64", -1, 3)]
FEATURES = [tensor("OUTPUT__0", "float32", -1, 8, 7, 7)]
INPUTS = {
    "encoded images": [tensor("IMAGE", "bytes", -1, 1)],
    "preprocessed images": [
        tensor("INPUT__0", "float32", -1, 3, 64, 64),
        tensor("INPUT__0", "float16", 4, 3, 64, 64),
        tensor("INPUT__0", "uint8", -1, 64, 64, 3),
    ],
    "an array": [tensor("INPUT__0", "float32", -1, 1, 28, 28), tensor("INPUT__0", "float32", 2, 1, 28, 28)],
}
OUTPUTS = [(SCORES, None), (RANKED, 3), (FEATURES, None)]


@pytest.fixture(scope="module")
def clients() -> list[str]:
    """The text of every kind of client."""
    kinds = [(sends, image) for sends, images in INPUTS.items() for image in images]
    return [
        client.render(protocol, {"name": "tiny", "top_k": top_k}, image, outputs, sends, labels=labels)
        for protocol, (sends, image), (outputs, top_k), labels in itertools.product(
            client.PORTS, kinds, OUTPUTS, (False, True)
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


@pytest.mark.parametrize(
    ("image", "dtype", "line"),
    [
        (INPUTS["preprocessed images"][1], "FP16", "np.resize(batch, [4, 3, 64, 64])  # the model takes exactly 4"),
        (INPUTS["preprocessed images"][2], "UINT8", "np.stack([preprocess(path, read()) for path in sys.argv[1:]])"),
    ],
)
def test_a_client_sends_the_dtype_and_the_batch_of_the_model(image: TensorSignature, dtype: str, line: str) -> None:
    text = client.render("grpc", {"name": "tiny", "top_k": None}, image, SCORES, "preprocessed images", labels=True)
    assert f'triton.InferInput("INPUT__0", list(batch.shape), "{dtype}")' in text
    assert line in text
    assert (".astype(np.float16)" in text) == (dtype == "FP16")
    assert "{labels[index]}" in text
