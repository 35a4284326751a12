"""Folders and files of the user: their names, and networks of several files."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from build_tasks.verification import accuracy_samples
from tests.support.project import Project, failure_line

LAYERS = """\
from torch import nn


class Kopf(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, {classes})

    def forward(self, x):
        return self.linear(x.mean(dim=(2, 3)))
"""
NETWORK = """\
from torch import nn
from {layers} import Kopf


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = Kopf()

    def forward(self, x):
        from {layers} import Kopf  # also while the network runs
        return self.head(self.conv(x))


def build():
    return Network()
"""
SPEC = """\
formats = ["torchscript", "onnx"]
max_batch_size = 3
labels = "Namen für alle.txt"

[architecture]
network = "{network}:build"

[input]
shape = [3, 16, 16]

[weights]
source = "gewichte-ä.safetensors"

[accuracy]
samples = "Bilder 日本"
"""


def add(project: Project, name: str, network: str, layers: str, classes: int) -> Path:
    """Add a model with a network of two files, and return its folder."""
    folder = project.model(name, SPEC.format(network=network))
    file = folder / f"{layers.replace('.', '/')}.py"
    for path, text in ((folder / network, NETWORK.format(layers=layers)), (file, LAYERS.format(classes=classes))):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    torch.manual_seed(1)
    tensors = {"conv.weight": (5, 3, 3, 3), "conv.bias": (5,), "head.linear.weight": (classes, 5)}
    state = {key: torch.randn(shape) for key, shape in {**tensors, "head.linear.bias": (classes,)}.items()}
    save_file(state, folder / "gewichte-ä.safetensors")
    (folder / "Namen für alle.txt").write_text("".join(f"klasse-{n}-é\n" for n in range(classes)), encoding="utf-8")
    (folder / "Bilder 日本").mkdir()
    for path in sorted(Path(accuracy_samples.SHIPPED_PHOTOGRAPHS).glob("*.jpg")):
        shutil.copy(path, folder / f"Bilder 日本/ñ {path.name}")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("files") / "project")
    add(project, "resnet-18", "netzwerk-1ö.py", "layers", 4)
    add(project, "3-d-net", "network.py", "layers", 6)
    add(project, "nested", "code/network.py", "code_of_it.layers", 3)
    folder = add(project, "umlauts", "network.py", "layers", 4)
    (folder / "network.py").write_text((folder / "network.py").read_text().replace("Network", "Größe"))
    run = project.doit()
    assert run.failed == ["torchscript:umlauts"], run.out
    assert failure_line(run, "torchscript:umlauts").endswith(
        "TorchScript takes only ASCII letters in names of classes and attributes: rename those of the network"
    )
    shutil.rmtree(folder)
    return project


@pytest.mark.parametrize(("name", "classes"), [("resnet-18", 4), ("3-d-net", 6), ("nested", 3)])
def test_a_folder_with_a_hyphen_and_files_with_other_letters_build(built: Project, name: str, classes: int) -> None:
    module = torch.jit.load(built / f"model_repository/{name}/1/model.pt")
    assert module(torch.zeros(2, 3, 16, 16)).shape == (2, classes)
    labels = (built / f"model_repository/{name}_onnx/labels.txt").read_text(encoding="utf-8")
    assert labels.startswith("klasse-0-é\n")


def test_an_edit_of_a_file_beside_the_network_is_noticed(built: Project) -> None:
    assert built.built("resnet-18").ran == []
    path = built / "models/resnet-18/layers.py"
    path.write_text(path.read_text() + "\n# edited\n")
    assert "torchscript:resnet-18" in built.plan("resnet-18")["to run"]


CONFIGURED = """\
import json
import os

import torch


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        with open(os.path.join(os.path.dirname(__file__), "{name}"), encoding="utf-8") as file:
            self.factor = json.load(file)["factor"]
        self.head = torch.nn.Linear(3, 4)

    def forward(self, x):
        return self.factor * self.head(x.mean((2, 3)))
"""
SPEC_OF_CONFIGURED = """\
formats = ["torchscript"]
max_batch_size = 3

[architecture]
network = "network.py:Network"

[input]
shape = [3, 16, 16]

[weights]
source = "random://0"
"""


@pytest.mark.parametrize("name", ["network.json", "code/network.yaml"])
def test_an_edit_of_a_configuration_that_the_network_reads_is_noticed(project: Project, name: str) -> None:
    network = CONFIGURED.replace("{name}", name)
    folder = project.model("net", SPEC_OF_CONFIGURED, network_py=network)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text('{"factor": 2}')
    project.built("publish:net")
    published = project / "model_repository/net/1/model.pt"
    x = torch.ones(2, 3, 16, 16)
    before = torch.jit.load(published)(x)
    assert project.built("publish:net").ran == []
    (folder / name).write_text('{"factor": 5}')
    project.built("publish:net")
    torch.testing.assert_close(torch.jit.load(published)(x), 2.5 * before)
    (folder / "model.toml").write_text((folder / "model.toml").read_text() + "# a comment\n")
    assert project.built("publish:net").ran == []
