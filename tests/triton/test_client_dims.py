"""Shapes and labels that clients see, from the spec to config.pbtxt."""

# ruff: noqa: E501  (one mistake a line)

import json
import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format

from build_tasks.errors import UserError
from build_tasks.spec.loader import load
from build_tasks.stages import config
from build_tasks.triton.model_config import to_message
from tests.support.project import ROOT

SPEC = """\
formats = ["onnx"]
[architecture]
timm = "test_efficientnet"
[weights]
source = "random://0"
[dimensions.length]
max = 16
opt = 8
[[inputs]]
name = "sound"
shape = [2, "length"]
dims = [1, 2, "length", 1]
[[outputs]]
name = "scores"
labels = "kinds.txt"
[[outputs]]
name = "colors"
labels = "colors.txt"
dims = [2, 3]
"""
SIGNATURE = {
    "inputs": [{"name": "sound", "dtype": "float32", "shape": [-1, 2, -1]}],
    "outputs": [
        {"name": "scores", "dtype": "float32", "shape": [-1, 4]},
        {"name": "colors", "dtype": "float32", "shape": [-1, 6]},
    ],
    "opset": 17,
    "ir_version": 8,
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build_tasks").symlink_to(ROOT / "build_tasks")
    folder = tmp_path / "models/m"
    folder.mkdir(parents=True)
    for file, count in {"kinds.txt": 4, "colors.txt": 3}.items():
        (folder / file).write_text("label\n" * count)
    return folder


def derived(text: str) -> Any:
    """Return the ModelConfig that the stage `config` writes, with labels as the stage `labels` writes them."""
    Path("models/m/model.toml").write_text(text)
    [model] = load()
    Path("build/m").mkdir(parents=True)
    Path("build/m/model.onnx.signature.json").write_text(json.dumps(SIGNATURE))
    for file, count in {"scores": 4, "colors": 3}.items():
        Path(f"build/m/labels.{file}.txt").write_text("label\n" * count)
    stage = config.task(model, "onnx", ["model.onnx"])["meta"]["stage"]
    stage.build(stage.inputs, stage.outputs, stage.settings)
    return text_format.Parse(Path(stage.outputs["config"]).read_text(), to_message({}))


def test_triton_reshapes_between_clients_and_the_network() -> None:
    parsed = derived(SPEC)
    assert list(parsed.input[0].dims) == [1, 2, -1, 1]
    assert list(parsed.input[0].reshape.shape) == [2, -1]
    assert list(parsed.model_warmup[0].inputs["sound"].dims) == [1, 2, 8, 1], "warm-up requests are those of clients"
    assert list(parsed.output[1].dims) == [2, 3]
    assert list(parsed.output[1].reshape.shape) == [6]
    assert [output.label_filename for output in parsed.output] == ["labels.scores.txt", "labels.colors.txt"]


WRONG = {
    "other words": ('dims = ["other", 2]', "inputs[0].dims: expected the words of shape, length, found other"),
    "other order": ('dims = ["length", 2]', "inputs[0].dims: expected dims of as many values as [2, -1], between the same"),
    "other values": ('dims = [3, "length"]', "expected dims of as many values as [2, -1], between the same open dimensions"),
    "no value": ("dims = []", "inputs[0].dims: expected array of length >= 1"),
    "labels twice": ("", "labels: expected nothing, since outputs[0].labels has those of the first output"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_dims_and_labels_are_refused_with_one_line(kind: str) -> None:
    line, message = WRONG[kind]
    text = re.sub(r"dims = .*1\]", line, SPEC) if line else SPEC
    text = f'labels = "kinds.txt"\n{text}' if kind == "labels twice" else text

    with pytest.raises(UserError) as error:
        derived(text)
    assert message in str(error.value).replace("`", "")
    assert str(error.value).startswith("models/m/model.toml: ")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("dims = [2, 3]", "dims = [5]", "expected dims of as many values as [6], between the same open dimensions, for colors, found [5]"),
        ('"kinds.txt"\n[[outputs]]', '"kinds.txt"\ndims = [2, 2]\n[[outputs]]', "one label for each of the 2 classes of scores"),
    ],
)  # fmt: skip
def test_what_only_the_artifact_shows_is_refused_with_one_line(old: str, new: str, message: str) -> None:
    text = SPEC.replace(old, new)
    assert text != SPEC
    with pytest.raises(UserError) as error:
        derived(text)
    assert message in str(error.value)
