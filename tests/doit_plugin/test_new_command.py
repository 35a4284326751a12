"""`doit new`: specs that load, say what timm says, and build; and what is refused, without a trace."""

import importlib.metadata
import json
import os
import re
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import helper, numpy_helper

from build_tasks.doit_plugin.new_command import New
from build_tasks.spec.loader import parse
from tests.support.project import OTHER, ROOT, Project

Doit = Callable[..., tuple[int, str]]

VERSION = importlib.metadata.version("timm")
SCHEMA = json.loads((ROOT / "models/model.schema.json").read_text())


@pytest.fixture
def doit_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doit:
    """The command in this process, in an empty project: timm takes seconds to import."""
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()

    def run(*words: str) -> tuple[int, str]:
        code = New().parse_execute(list(words))
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def spec_of(path: Path) -> dict[str, Any]:
    """The spec that was written; it fits the schema, also with every key that it only suggests."""
    text = path.read_text()
    assert text.startswith("#:schema ../model.schema.json\n")
    for toml in (text, uncommented(text)):
        jsonschema.validate(tomllib.loads(toml), SCHEMA, jsonschema.Draft7Validator)
    return tomllib.loads(text)


def uncommented(text: str) -> str:
    return re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)


def test_an_architecture_comes_with_its_own_preprocessing_weights_and_labels(project: Project) -> None:
    out = project.built("new", "b3", "--architecture", "efficientnet_b3").out
    assert out.splitlines() == [
        "wrote models/b3/model.toml",
        "next: `doit plan b3` shows what will run, `doit b3` builds it",
    ]
    assert spec_of(project / "models/b3/model.toml") == {
        "labels": "imagenet-1k",
        "architecture": {"timm": "efficientnet_b3.ra2_in1k"},
        "weights": {"source": "timm://efficientnet_b3.ra2_in1k"},
        "input": {
            "shape": [3, 288, 288],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
        },
        **{table: {} for table in ("onnx", "engine", "accuracy", "triton")},
    }
    shown = project.terminal("new", "b4", "--architecture", "efficientnet_b4").splitlines()
    assert shown[:2] == ["looking up efficientnet_b4 in timm: some seconds", "wrote models/b4/model.toml"]
    text = (project / "models/b3/model.toml").read_text()
    assert "timm tests it at 320 x 320" in text
    assert "put the file at models/b3/model.safetensors" in text
    assert "b3 " in project.built("list").out


def test_what_it_suggests_are_the_defaults(doit_new: Doit) -> None:
    """Nothing changes by taking a line that names a default out of its comment."""
    assert doit_new("m", "--architecture", "resnet18.a1_in1k")[0] == 0
    text = Path("models/m/model.toml").read_text()
    bare = re.sub(r"^(ensemble|samples|opt_batch_size) = .*\n", "", uncommented(text), flags=re.MULTILINE)
    ours, theirs = (parse("m", toml.encode()) for toml in (text, bare))
    assert theirs.spec.triton == {"release": ours.release, "device": ours.triton_keys.device}
    theirs.spec.triton.clear()
    assert ours == theirs


@pytest.mark.parametrize(
    ("architecture", "keys", "comment"),
    [
        ("resnet50.tv_in1k", {"timm": "resnet50.tv_in1k", "source": "timm://resnet50.tv_in1k"}, "resnet50.tv_in1k of"),
        (
            "resnetv2_50x1_bit.goog_in21k",
            {"timm": "resnetv2_50x1_bit.goog_in21k", "labels": None, "interpolation": "bilinear"},
            "21843 classes",
        ),
        ("coatnet_0_224", {"source": "random://0"}, "timm has no pretrained weights of this architecture"),
        ("vit_base_patch16_224", {"mean": [0.5] * 3, "crop_pct": 0.9}, "license of the weights: apache-2.0"),
    ],
)
def test_what_timm_has_of_an_architecture(
    doit_new: Doit, architecture: str, keys: dict[str, object], comment: str
) -> None:
    code, out = doit_new("--architecture", architecture, "m")
    assert code == 0, out
    spec = spec_of(Path("models/m/model.toml"))
    found = {**spec, **spec["architecture"], **spec["weights"], **spec["input"]}
    assert {key: found.get(key) for key in keys} == keys
    assert comment in Path("models/m/model.toml").read_text()
    assert ("RANDOM" in out) == (keys.get("source") == "random://0")


def test_a_new_model_builds(project: Project) -> None:
    project.built("new", "small", "--architecture", "test_efficientnet", "--weights", "random://0")
    project.edit("models/small/model.toml", '# formats = ["torchscript", "onnx", "tensorrt"]', 'formats = ["onnx"]')
    project.edit("models/small/model.toml", "# max_batch_size = 32", "max_batch_size = 2")
    assert "publish:small_onnx" in project.built("small").ran
    labels = (project / "model_repository/small_onnx/labels.txt").read_text().splitlines()
    assert len(labels) == 1000
    assert project.built("small").ran == []


def tensors(prefix: str = "", **arguments: Any) -> dict[str, torch.Tensor]:
    state = timm.create_model("test_efficientnet", **arguments).state_dict()
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def halved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def without(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


GRAY = {"num_classes": 10, "in_chans": 1}
TEN = {"arguments": {"num_classes": 10}}

# The content of the checkpoint, keys of the spec, what is said of it.
CHECKPOINTS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "ten classes, gray, wrapped": (
        lambda: {"epoch": 3, "state_dict": tensors("module.", **GRAY)},
        {"arguments": GRAY, "shape": [1, 160, 160], "mean": [0.0], "labels": None, "accuracy": {}},
        "10 classes, 1 channel, tensors: 88, taken from: state_dict, removed: module. before 88 of 88 names",
    ),
    "a prefix": (
        lambda: tensors("backbone.", num_classes=10) | {"decoder.weight": torch.zeros(1)},
        {**TEN, "prefix": "backbone.", "labels": None},
        "the prefix backbone., tensors: 88, left out: 1 without the prefix backbone., such as decoder.weight",
    ),
    "half precision": (
        lambda: halved(tensors(num_classes=10)),
        TEN,
        "10 classes, 3 channels, tensors: 88, types: 75 from float16 to float32",
    ),
    "an average beside": (
        lambda: {"model": tensors(num_classes=10), "model_ema": tensors(num_classes=10)},
        {**TEN, "ema": None},
        "left: model_ema, an average (weights.ema = true takes it)",
    ),
    "no classifier": (lambda: tensors(num_classes=0), {"arguments": {"num_classes": 0}}, "no classifier, 3 channels"),
    "ImageNet": (tensors, {"labels": "imagenet-1k", "arguments": None}, "1000 classes, 3 channels, tensors: 88"),
    "two prefixes": (
        lambda: tensors("model.teacher.", num_classes=10) | tensors("model.student.", num_classes=10),
        {**TEN, "prefix": None, "labels": None},
        'each with a prefix: choose one, set weights.prefix = "model.teacher." or "model.student."',
    ),
    "two prefixes, other classes": (
        lambda: tensors("net.") | tensors("student.", num_classes=10),
        {"prefix": None},
        'each with a prefix: choose one, set weights.prefix = "net." or "student."',
    ),
    "ten classes, and a tensor is missing": (
        lambda: without(tensors("body.", num_classes=10), "body.bn1.bias"),
        {**TEN, "prefix": "body.", "labels": None},
        "net.pth does not fit the architecture: 1 missing: bn1.bias;",
    ),
    "ten classes, and the first tensor is missing": (
        lambda: without(tensors(num_classes=10), "conv_stem.weight"),
        {**TEN, "prefix": None, "labels": None},
        "net.pth does not fit the architecture: 1 missing: conv_stem.weight;",
    ),
    "ten classes, and a tensor too much": (
        lambda: tensors(num_classes=10) | {"loss.weight": torch.ones(1)},
        {**TEN, "labels": None},
        "net.pth does not fit the architecture: 1 unexpected: loss.weight;",
    ),
    "ten classes twice": (
        lambda: {"a": tensors(num_classes=10), "b": tensors(num_classes=10)},
        {**TEN, "labels": None},
        "net.pth has 2 sets of weights that fit, a, b: choose one with weights.converter",
    ),
    "a prefix, and another in an average": (
        lambda: {"state_dict_ema": tensors("ema."), "state_dict": tensors("net.")},
        {"prefix": "net."},
        "the prefix net., tensors: 88, taken from: state_dict",
    ),
    "another network with some names of this one": (
        lambda: timm.create_model("test_resnet", num_classes=5).state_dict(),
        {"arguments": None, "labels": "imagenet-1k"},
        "net.pth does not fit the architecture:",
    ),
    "another network": (
        lambda: {"conv.weight": torch.zeros(1)},
        {"labels": "imagenet-1k"},
        "net.pth does not fit the architecture: 75 missing",
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_is_looked_into_and_copied(doit_new: Doit, case: str) -> None:
    make, keys, line = CHECKPOINTS[case]
    torch.save(make(), "net.pth")
    code, out = doit_new("m", "--architecture", "test_efficientnet", "--weights", "net.pth")
    assert code == 0, out
    assert line in out
    spec = spec_of(Path("models/m/model.toml"))
    found = {**spec, **spec["architecture"], **spec["weights"], **spec["input"]}
    assert {key: found.get(key) for key in keys} == keys
    assert (found["source"], Path("models/m/net.pth").read_bytes()) == ("net.pth", Path("net.pth").read_bytes())


def test_what_a_checkpoint_does_not_say_is_left_to_the_user(doit_new: Doit) -> None:
    """The names of the classes, and how pictures were prepared."""
    torch.save(tensors(num_classes=10), "net.pth")
    _, out = doit_new("m", "--architecture", "test_efficientnet", "--weights", "net.pth")
    assert "fill in: models/m/labels.txt with the names of the 10 classes" in out
    assert "check: [input] has the values of timm's own weights; set those of your training" in out


def test_a_checkpoint_for_another_size_of_pictures_is_named(doit_new: Doit) -> None:
    torch.save(timm.create_model("test_vit", img_size=224).state_dict(), "net.pth")
    _, out = doit_new("m", "--architecture", "test_vit", "--weights", "net.pth")
    assert "converted: by timm, pos_embed resized from [1, 197, 64] to [1, 101, 64]" in out
    assert "check: the file may be of a network for pictures of another size" in out


def test_a_checkpoint_that_is_not_there_is_refused(doit_new: Doit) -> None:
    code, out = doit_new("m", "--architecture", "test_efficientnet", "--weights", "../typo.pth")
    assert (code, out) == (3, "ERROR: --weights: ../typo.pth does not exist\n")
    assert not Path("models/m").exists()


def trainer_folder(folder: Path) -> None:
    """What the Trainer of Hugging Face saves, with the weights in shards."""
    folder.mkdir(parents=True)
    for name in ("model-1.safetensors", "model-2.safetensors", "optimizer.pt", "config.json"):
        (folder / name).touch()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


NO_CHECKPOINTS = {  # the path of --weights, and the line
    "in/hf": "in/hf, which is a folder: name one of the checkpoints in it: model.safetensors.index.json, optimizer.pt",
    "in": "in, which is a folder: name one of the checkpoints in it: hf/model.safetensors.index.json, hf/optimizer.pt",
    "in/empty": "in/empty, which is a folder, and has no checkpoint in it",
    "in/fifo": "in/fifo, which is a FIFO",
}


@pytest.mark.parametrize("source", [["--architecture", "test_resnet"], ["--network", "net.py:build"]])
def test_weights_that_are_no_file_are_refused(doit_new: Doit, source: list[str]) -> None:
    trainer_folder(Path("in/hf"))
    Path("in/empty").mkdir()
    os.mkfifo("in/fifo")
    Path("link.pth").symlink_to("gone.pth")
    for path, line in NO_CHECKPOINTS.items():
        assert doit_new("m", *source, "-w", path) == (3, f"ERROR: --weights: expected a file, found {line}\n")
    gone = f"link.pth is a link to {Path('gone.pth').resolve()}, which"
    for path, what in {"in/typo.pth": "in/typo.pth", "link.pth": gone}.items():
        assert doit_new("m", *source, "-w", path) == (3, f"ERROR: --weights: {what} does not exist\n")
    assert not list(Path("models").iterdir())


def test_the_home_folder_of_a_path_is_found(doit_new: Doit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell leaves `--weights=~/net.pth` as it is."""
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    Path("home").mkdir()
    torch.save(tensors(), "home/net.pth")
    assert doit_new("m", "--architecture", "test_efficientnet", "--weights=~/net.pth")[0] == 0
    assert Path("models/m/net.pth").exists()


def test_a_name_that_the_folder_of_the_model_cannot_have_is_refused(doit_new: Doit) -> None:
    """The name of the spec, and one that a spec in UTF-8 cannot hold."""
    Path("in").mkdir()
    refused = {
        "in/model.toml": "in/model.toml: model.toml is the name of the spec beside which it is copied: rename the file",
        os.fsdecode(b"in/\xff.pth"): "--weights: expected a name in UTF-8, found in/\\udcff.pth: rename the file",
    }
    for path, line in refused.items():
        torch.save(tensors(), path)
        assert doit_new("m", "--architecture", "test_efficientnet", "-w", path) == (3, f"ERROR: {line}\n")
    assert not list(Path("models").iterdir())


def as_integers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {**state, "conv_stem.weight": state["conv_stem.weight"].to(torch.int8)}


def with_value(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {**state, "conv_stem.weight": torch.full_like(state["conv_stem.weight"], value)}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (as_integers, "net.pth cannot be the weights: conv_stem.weight is quantized (int8)"),
        (with_value(torch.nan), "net.pth has NaN or infinity in 1 tensors: conv_stem.weight; train it again"),
        (with_value(torch.inf), "net.pth has NaN or infinity in 1 tensors: conv_stem.weight; train it again"),
    ],
    ids=["integers", "NaN", "infinity"],
)
def test_a_checkpoint_that_the_next_doit_refuses_is_refused_at_once(
    doit_new: Doit, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], line: str
) -> None:
    torch.save(change(tensors()), "net.pth")
    code, out = doit_new("m", "--architecture", "test_efficientnet", "--weights", "net.pth")
    assert code == 3
    assert out.startswith(f"ERROR: {line}"), out
    assert not Path("models/m").exists()


def test_a_checkpoint_in_a_data_folder_is_not_copied(doit_new: Doit, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("data").mkdir()
    torch.save(tensors(), "data/net.pth")
    monkeypatch.setenv("BUILD_DATA_FOLDERS", str(Path("data").resolve()))
    assert doit_new("m", "--architecture", "test_efficientnet", "--weights", "data/net.pth")[0] == 0
    assert spec_of(Path("models/m/model.toml"))["weights"] == {"source": str(Path("data/net.pth").resolve())}
    assert not Path("models/m/net.pth").exists()


NETWORKS = """\
import torch
from torch import nn

class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.kinds, self.head = nn.Embedding(30, 8), nn.Embedding(7, 8), nn.Linear(8, 3)
    def forward(self, input_ids, kind_ids, attention_mask, past=None):
        x = (self.words(input_ids) + self.kinds(kind_ids)) * attention_mask[..., None]
        return {"states": x, "logits": self.head(x.sum(1))}

class Odd(Text):
    def forward(self, left, right: torch.Tensor):
        assert left.shape[1:] == (5,)
        return left

class Rate(Odd):
    def forward(self, x: torch.Tensor, rate: int):
        return x

def broken():
    raise ValueError("no weights")

class Recogniser(nn.Module):  # of text lines: (time, batch, classes)
    def __init__(self):
        super().__init__()
        self.c = nn.Conv2d(1, 5, 16, stride=16)
    def forward(self, x):
        return self.c(x).mean(2).permute(2, 0, 1)

class Steps(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.Linear(6, 4)
    def forward(self, steps):
        return steps.mean(1), self.h(steps).transpose(0, 1)

class Sound(nn.Module):
    def __init__(self):
        super().__init__()
        self.h = nn.Linear(32, 6)
    def forward(self, audio):
        return self.h(audio.unfold(1, 32, 8))
"""


def spec_of_new(project: Project, network: str) -> dict[str, Any]:
    """The spec of a network of NETWORKS."""
    project.built("new", network, "--network", f"net.py:{network}")
    return spec_of(project / f"models/{network}/model.toml")


def test_the_inputs_of_a_network_are_found_by_trial(project: Project) -> None:
    (project / "net.py").write_text(NETWORKS)
    found = project.built("new", "text", "--network", "net.py:Text").out
    assert "fill in: max in models/text/model.toml: the largest length that is served" in found
    assert "the weights are RANDOM" in found
    assert "copied" not in found, "the project's own modules, which lie in the same folder, are no part of the network"
    spec = spec_of(project / "models/text/model.toml")
    assert spec["inputs"] == [
        {"name": "input_ids", "dtype": "int64", "shape": ["length"], "high": 29},
        {"name": "kind_ids", "dtype": "int64", "shape": ["length"], "high": 6},
        {"name": "attention_mask", "dtype": "int64", "shape": ["length"], "values": [1]},
    ]
    assert spec["dimensions"] == {"length": {"min": 1, "opt": 16, "max": 64}}
    assert "reference:text" in project.built("reference:text").ran, "it builds without an edit"
    assert spec_of_new(project, "Recogniser")["outputs"] == [{"batch_dimension": 1}]
    two = [{"key": 0}, {"key": 1, "batch_dimension": 1}]
    assert spec_of_new(project, "Steps")["outputs"] == two
    sound = spec_of_new(project, "Sound")
    assert (sound["inputs"][0]["shape"], sound.get("outputs")) == (["samples"], None)
    odd = project.built("new", "odd", "--network", "net.py:Odd").out
    for name in ("left", "right"):
        assert f"fill in: shape in models/odd/model.toml: the dimensions of {name} without the batch" in odd
    for network, line in {
        "net.py:Rate": "net.py: forward takes (x, rate), and rate is int, no tensor: give it a default in a network",
        "net.py:broken": "net.py, line 22: ValueError: no weights",
        "net.py:absent": "net.py: there is no function absent",
        "absent.py:build": "--network: expected a Python file and its function, net.py:build, found 'absent.py:build'",
        "net.py": "--network: expected a Python file and its function, net.py:build, found 'net.py'",
    }.items():
        refused = project.doit("new", "wrong", "--network", network)
        assert (refused.code, refused.out.startswith(f"ERROR: {line}")) == (3, True), refused.out
    assert not (project / "models/wrong").exists()


PARTS = {  # a network of several files
    "src/net.py": """\
import os
import torch
from layers import Head
from pkg.stem import stem
import unused.inner

def build():
    import late
    return torch.nn.Sequential(stem(), Head(late.CLASSES))

def pretrained():
    network = build()
    network.load_state_dict(torch.load(os.path.join(os.path.dirname(__file__), "own.pth")))
    return network
""",
    "src/layers.py": """\
from torch import nn

class Head(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
""",
    "src/pkg/__init__.py": "",
    "src/pkg/stem.py": "from torch import nn\n\ndef stem():\n    return nn.Conv2d(3, 8, 3)\n",
    "src/late.py": "import net\n\nCLASSES = 5\n",
    "src/unused/inner.py": "import build_tasks.figures\n",  # a package without __init__.py
    "src/other.py": "raise RuntimeError('no part of the network')\n",
}


def parts_of_a_network(project: Project) -> dict[str, torch.Tensor]:
    """Write PARTS, and return a state dict of the network."""
    for path, text in PARTS.items():
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text(text)
    state = {
        "0.weight": torch.rand(8, 3, 3, 3),
        "0.bias": torch.rand(8),
        "1.2.weight": torch.rand(5, 8),
        "1.2.bias": torch.rand(5),
    }
    torch.save(state, project / "src/own.pth")
    return state


def test_the_files_that_a_network_imports_are_copied(project: Project) -> None:
    """Those that its file imports from its folder, also while it is built; what else it reads is named."""
    parts_of_a_network(project)
    out = project.built("new", "parts", "--network", "src/net.py:build").out
    assert "copied beside net.py: late.py, layers.py, pkg/__init__.py, pkg/stem.py, unused/inner.py, which it" in out
    assert "fill in" not in out
    beside = {path.removeprefix("parts/") for path in project.tree("models") if path.endswith(".py")}
    assert beside == {path.removeprefix("src/") for path in PARTS} - {"other.py"}
    assert "weights:parts" in project.built("weights:parts").ran

    out = project.built("new", "reading", "--network", "src/net.py:pretrained").out
    line = "fill in: the files in models/reading that net.py reads: models/reading/net.py, line 13: FileNotFoundError: "
    assert line in out
    assert "models/reading/own.pth'" in out
    (project / "models/reading/own.pth").write_bytes((project / "src/own.pth").read_bytes())
    assert "weights:reading" in project.built("weights:reading").ran


def test_the_checkpoint_of_a_network_is_looked_into(project: Project) -> None:
    state = parts_of_a_network(project)
    student = {f"student.{key}": tensor.half() for key, tensor in state.items()}
    teacher = {f"teacher.{key}": tensor for key, tensor in state.items()}
    for name, content in {
        "plain": state,
        "student": {"epoch": 3, "net": student | {"loss.weight": torch.zeros(1)}},
        "both": teacher | student,
        "misfit": {**state, "1.2.bias": torch.rand(7)},
    }.items():
        torch.save(content, project / f"{name}.pth")
    lines = {
        "plain": "found in plain.pth: tensors: 4",
        "student": "found in student.pth: the prefix student., tensors: 4, types: 4 from float16 to float32, taken "
        "from: net, left out: 1 without the prefix student., such as loss.weight",
        "both": "both.pth has 2 sets of weights that fit, each with a prefix: choose one, set weights.prefix = "
        '"teacher." or "student."; ',
        "misfit": "misfit.pth does not fit the architecture: 1 wrongly shaped: 1.2.bias [7] instead of [5]",
    }
    for name, line in lines.items():
        assert line in project.built("new", name, "--network", "src/net.py:build", "--weights", f"{name}.pth").out
        assert (project / f"models/{name}/{name}.pth").exists()
    prefixes = {name: spec_of(project / f"models/{name}/model.toml")["weights"].get("prefix") for name in lines}
    assert prefixes == {"plain": None, "student": "student.", "both": None, "misfit": None}
    assert "weights:student" in project.built("weights:student").ran

    (project / "text.pth").write_text("no checkpoint")
    torch.save(state, project / "layers.py")
    for file, line in {
        "text.pth": "text.pth cannot be read as weights: it is not a checkpoint",
        "layers.py": "layers.py and src/layers.py cannot lie in one folder: rename one of them",
    }.items():
        refused = project.doit("new", "wrong", "--network", "src/net.py:build", "-w", file)
        assert (refused.code, refused.out.startswith(f"ERROR: {line}")) == (3, True), refused.out
    assert not (project / "models/wrong").exists()


SEQUENCES = """\
import torch


class Recurrent(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.LSTM(6, 8, batch_first=True)

    def forward(self, x):
        answer, (hidden, cell) = self.layer(x)
        return answer, hidden, cell


class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x)
"""


@pytest.mark.parametrize(("name", "places"), [("Recurrent", [0, 1, 1]), ("Attention", [0, 0])])
def test_a_sequence_is_not_taken_for_a_batch(doit_new: Doit, name: str, places: list[int]) -> None:
    """Both take a sequence without a batch, too: [16, 6] would be 16 samples of [6]."""
    Path("net.py").write_text(SEQUENCES)
    code, out = doit_new("m", "--network", f"net.py:{name}")
    assert code == 0, out
    spec = spec_of(Path("models/m/model.toml"))
    assert spec["inputs"][0]["shape"] == ["length", 6]
    found = [table.get("batch_dimension", 0) for table in spec.get("outputs", [{}] * len(places))]
    assert found == places


def test_an_answer_whose_shape_depends_on_the_values_is_no_error(doit_new: Doit) -> None:
    """Its rows beside another sample and alone cannot be compared."""
    Path("net.py").write_text(
        "import torch\n\n\nclass Net(torch.nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(6, 2)\n\n"
        "    def forward(self, x):\n"
        "        return super().forward(x).sum() + x.new_zeros(len(x), 4 + int((x > 0.5).sum()))\n"
    )
    code, out = doit_new("m", "--network", "net.py:Net")
    assert code == 0, out
    assert spec_of(Path("models/m/model.toml"))["inputs"][0]["shape"] == [6]


def test_what_does_not_run_says_what_the_network_says(doit_new: Doit) -> None:
    """The size is not what is wrong with a network in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).double()
        torch.jit.trace(network, torch.rand(2, 3, 32, 32).double()).save("net.pt")
    code, out = doit_new("m", "--from-torch", "net.pt")
    assert code == 0
    assert re.search(r"fill in: shape in .*no size that was tried fits: .*Double", out), out
    spec_of(Path("models/m/model.toml"))


def test_the_bounds_of_a_file_of_torch_export_are_kept(doit_new: Doit) -> None:
    dims = {0: torch.export.Dim("batch", max=8), 2: torch.export.Dim("height", min=16, max=64)}
    network = torch.nn.Conv2d(3, 4, 3, padding=1).eval()
    torch.export.save(torch.export.export(network, (torch.rand(2, 3, 32, 48),), dynamic_shapes=(dims,)), "net.pt2")
    code, out = doit_new("m", "--from-torch", "net.pt2")
    assert code == 0, out
    spec = spec_of(Path("models/m/model.toml"))
    assert (spec["max_batch_size"], spec["input"]["shape"]) == (8, [3, 64, 48])


def test_a_file_of_torch_export_records_its_inputs(project: Project) -> None:
    module: dict[str, Any] = {"__name__": "networks"}
    exec(NETWORKS, module)
    dims = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=48)}
    tensors = tuple(torch.ones(2, 5, dtype=torch.int64) for _ in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module["Text"]().eval(), tensors, dynamic_shapes=(dims, dims, dims))
        torch.export.save(program, project / "text.pt2")
    project.built("new", "text", "--from-torch", "text.pt2")
    spec = spec_of(project / "models/text/model.toml")
    (word,) = spec["dimensions"]
    assert [(each["name"], each["shape"]) for each in spec["inputs"]] == [
        (name, [word]) for name in ("input_ids", "kind_ids", "attention_mask")
    ]
    assert spec["dimensions"][word] == {"min": 2, "opt": 12, "max": 48}


def test_dimensions_of_an_onnx_file_that_have_one_length_have_one_word(project: Project) -> None:
    """The file names none of them. Texts among the inputs are no hindrance, and among the outputs they are left out."""
    value, node = helper.make_tensor_value_info, helper.make_node
    inputs = [value("ids", 7, [None, None]), value("kinds", 7, [None, None]), value("query", 7, [None, None])]
    inputs.append(value("language", 8, ["n", 1]))
    outputs = [value("scores", 1, None), value("name", 8, None)]
    nodes = [
        node("Gather", ["table", "ids"], ["a"]),
        node("Gather", ["table", "kinds"], ["b"]),
        node("Add", ["a", "b"], ["c"]),
        node("Gather", ["table", "query"], ["q"]),
        node("Transpose", ["q"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["c", "t"], ["scores"]),
        node("Identity", ["language"], ["name"]),
    ]
    table = numpy_helper.from_array(np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32), "table")
    graph = helper.make_graph(nodes, "g", inputs, outputs, [table])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), project / "pairs.onnx")
    project.built("new", "--from-onnx", "pairs.onnx")
    spec = spec_of(project / "models/pairs/model.toml")
    shapes = {each["name"]: each["shape"] for each in spec["inputs"]}
    assert shapes == {"ids": ["ids_1"], "kinds": ["ids_1"], "query": ["query_1"], "language": [1]}
    assert [each.get("high") for each in spec["inputs"]] == [9, 9, 9, None]
    assert spec["outputs"] == [{"name": "scores"}]
    assert "onnx:pairs" in project.built("onnx:pairs").ran, "it builds without an edit"
    outputs = [outputs[1]]
    graph = helper.make_graph(nodes[-1:], "g", inputs[-1:], outputs)
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), project / "texts.onnx")
    line = "texts.onnx: the output name holds strings, which cannot be compared: the file has no other output"
    refused = project.doit("new", "--from-onnx", "texts.onnx")
    assert (refused.code, line in refused.out) == (3, True), refused.out


def test_the_inputs_of_an_onnx_file_are_taken_from_it(project: Project) -> None:
    """The batch of the state is its second dimension, and the rows of the table are the token ids."""
    value, node = helper.make_tensor_value_info, helper.make_node
    inputs = [value("ids", 7, ["batch", "length"]), value("state", 1, [2, "batch", 4])]
    outputs = [value("words", 1, ["batch", "length", 4]), value("next", 1, [2, "batch", 4])]
    nodes = [node("Gather", ["table", "ids"], ["words"]), node("Neg", ["state"], ["next"])]
    table = numpy_helper.from_array(np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32), "table")
    graph = helper.make_graph(nodes, "g", inputs, outputs, [table])
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), project / "speech.onnx")
    project.built("new", "--from-onnx", "speech.onnx")
    spec = spec_of(project / "models/speech/model.toml")
    assert spec["inputs"] == [
        {"name": "ids", "dtype": "int64", "shape": ["length"], "high": 9},
        {"name": "state", "dtype": "float32", "shape": [2, 4], "batch_dimension": 1},
    ]
    assert spec["outputs"] == [{"name": "words"}, {"name": "next", "batch_dimension": 1}]


USAGE = (
    "expected: doit new NAME --architecture TIMM_NAME [--weights SOURCE] | "
    "NAME --network FILE.py:FUNCTION [--weights SOURCE] | [NAME] --from-onnx FILE | [NAME] --from-torch FILE"
)
NAME = "a model's name is made of letters, digits, _ and -, and begins with a letter or digit"

REFUSED = [
    ("", USAGE),
    ("m", USAGE),
    ("--architecture resnet18", USAGE),
    ("m n --architecture resnet18", USAGE),
    ("m -a resnet18 --from-onnx m.onnx", USAGE),
    ("m -w random://0 --from-onnx m.onnx", USAGE),
    ("m -w random://0 --from-torch m.pt", USAGE),
    ("m --from-torch m.pt --from-onnx m.onnx", USAGE),
    ("m --network net.py:build -a resnet18", USAGE),
    ("--network net.py:build", USAGE),
    ("--from-torch absent.pt", "--from-torch: expected a file, found 'absent.pt', which is none"),
    ("there -a resnet18", "models/there exists already"),
    ("onnx -a resnet18", "models/onnx: doit has a command or stage named onnx; rename the folder"),
    ("new -a resnet18", "models/new: doit has a command or stage named new; rename the folder"),
    ("a.b -a resnet18", f"models/a.b: {NAME}"),
    ("../m -a resnet18", f"models/../m: {NAME}"),
    (
        "m -a efficentnet_b3",
        f"--architecture: expected an architecture of timm {VERSION}, found 'efficentnet_b3' "
        "(did you mean 'efficientnet_b3'?)",
    ),
    (
        "m -a efficientnet_b3.in1k",
        "--architecture: expected one of efficientnet_b3.ra2_in1k, found 'efficientnet_b3.in1k' "
        "(did you mean 'efficientnet_b3.ra2_in1k'?)",
    ),
    (
        "m -a coatnet_0_224.in1k",
        "--architecture: expected coatnet_0_224, which has no tags, found 'coatnet_0_224.in1k'",
    ),
    (
        "m -a resnet18 -w gopher://host/file",
        "models/m/model.toml: weights.source: expected one of hf://, https://, http://, package://, timm://, random:// "
        "or a path, found 'gopher://'",
    ),
    (
        "there_onnx -a resnet18",
        "models/there_onnx/model.toml: format torchscript is served as there_onnx, and so is format onnx of "
        "models/there/model.toml",
    ),
]


@pytest.mark.parametrize(("arguments", "line"), REFUSED, ids=[arguments or "nothing" for arguments, _ in REFUSED])
def test_it_refuses_with_one_line_and_leaves_nothing(doit_new: Doit, arguments: str, line: str) -> None:
    Path("models/there").mkdir()
    Path("models/there/model.toml").write_text(OTHER.replace('["torchscript"]', '["onnx"]'))
    assert doit_new(*arguments.split()) == (3, f"ERROR: {line}\n")
    assert [str(path) for path in Path("models").rglob("*")] == ["models/there", "models/there/model.toml"]


def test_a_mistake_in_another_spec_is_no_hindrance(doit_new: Doit) -> None:
    Path("models/broken").mkdir()
    Path("models/broken/model.toml").write_text("formats = 3")
    assert doit_new("m", "--architecture", "resnet18")[0] == 0
    assert Path("models/m/model.toml").exists()


def test_what_doit_says_of_it(project: Project) -> None:
    """It is doit's word, by the entry point; its help needs no model, and a refusal is doit's exit code."""
    out = project.built("help", "new").out
    assert USAGE.removeprefix("expected: ") in " ".join(out.split())
    refused = project.doit("new", "a.b", "--architecture", "resnet18")
    assert (refused.code, refused.out) == (3, f"ERROR: models/a.b: {NAME}\n")
    assert project.tree("models") == {}
