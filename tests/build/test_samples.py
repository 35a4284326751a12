"""Samples of any inputs, through the whole chain: open lengths, pictures beside arrays, and none at all."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from polygraphy.comparator import RunResults
from polygraphy.json import load_json, save_json
from safetensors.torch import save_file
from torch import nn

from build_tasks.triton.preprocess_model.preprocessing import preprocess
from tests.support import core_server
from tests.support.project import ROOT, Project, failure_line

PHOTOGRAPHS = sorted((ROOT / "build_tasks/verification/photographs").glob("*.jpg"))
LENGTHS = (3, 5, 3, 7, 5, 3)

ENCODER = """\
import torch
from torch import nn


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, ids, mask):
        weights = mask.unsqueeze(-1).float()
        states = self.embedding(ids) * weights
        return {"states": torch.tanh(states), "scores": self.head(states.sum(1) / weights.sum(1))}


def build():
    return Encoder()
"""
ENCODER_SPEC = """\
formats = ["torchscript", "onnx"]
max_batch_size = 4
[architecture]
network = "network.py:build"
[weights]
source = "weights.safetensors"
[[inputs]]
name = "ids"
dtype = "int64"
shape = ["length"]
low = 0
high = 49
[[inputs]]
name = "mask"
dtype = "int64"
shape = ["length"]
values = [1]
[dimensions.length]
min = 2
opt = 6
max = 8
[accuracy]
{accuracy}
"""
BOTH = """\
import torch
from torch import nn


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(7, 4)

    def forward(self, image, vector):
        return self.head(torch.cat([self.conv(image).mean((2, 3)), vector], 1))


def build():
    return Both()
"""
BOTH_SPEC = """\
formats = ["onnx"]
max_batch_size = 4
[architecture]
network = "network.py:build"
[weights]
source = "weights.safetensors"
[[inputs]]
name = "image"
shape = [3, 16, 12]
layout = "nchw"
color = "bgr"
crop_mode = "letterbox"
[[inputs]]
name = "vector"
shape = [2]
[accuracy]
samples = "samples"
"""


LISTENER = """\
from torch import nn


class Listener(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 20, stride=10)
        self.head = nn.Linear(4, 3)

    def forward(self, waveform):
        frames = self.conv(waveform.unsqueeze(1)).relu().transpose(1, 2)
        return self.head(frames), self.head(frames.mean(1))


def build():
    return Listener()
"""
LISTENER_SPEC = """\
formats = ["torchscript", "onnx", "rtx"]
max_batch_size = 4
[architecture]
network = "network.py:build"
[weights]
source = "weights.safetensors"
[[inputs]]
name = "waveform"
shape = ["samples"]
low = -1
high = 1
[dimensions.samples]
min = 100
opt = 400
max = 800
[[outputs]]
name = "frames"
[[outputs]]
name = "word"
classes = true
[accuracy]
samples = "sounds.npz"
[engine]
precision = "fp32"
"""
SEGMENTER = """\
from torch import nn


class Segmenter(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        return {"out": x, "aux": nn.functional.avg_pool2d(x, 2)}


def build():
    return Segmenter()
"""
SEGMENTER_SPEC = """\
formats = ["torchscript", "onnx", "rtx"]
max_batch_size = 4
[architecture]
network = "network.py:build"
[weights]
source = "weights.safetensors"
[input]
shape = [1, 16, 16]
scale = 255
[[outputs]]
name = "mask"
key = "out"
[engine]
precision = "fp32"
"""


def add_listener(project: Project) -> None:
    folder = project.model("listener", LISTENER_SPEC, network_py=LISTENER)
    torch.manual_seed(0)
    layers = nn.ModuleDict({"conv": nn.Conv1d(1, 4, 20), "head": nn.Linear(4, 3)})
    save_file(layers.state_dict(), folder / "weights.safetensors")
    waves = np.random.default_rng(0).uniform(-1, 1, (8, 500)) * np.linspace(0.1, 1, 8)[:, None]
    np.savez(folder / "sounds.npz", waveform=waves)


def add_segmenter(project: Project) -> None:
    folder = project.model("segmenter", SEGMENTER_SPEC, network_py=SEGMENTER)
    torch.manual_seed(0)
    save_file(nn.ModuleDict({"conv": nn.Conv2d(1, 4, 3)}).state_dict(), folder / "weights.safetensors")


def add_encoder(project: Project, name: str, accuracy: str = "") -> Path:
    folder = project.model(name, ENCODER_SPEC.format(accuracy=accuracy), network_py=ENCODER)
    torch.manual_seed(0)
    layers = nn.ModuleDict({"embedding": nn.Embedding(50, 6), "head": nn.Linear(6, 4)})
    save_file(layers.state_dict(), folder / "weights.safetensors")
    return folder


def add_both(project: Project) -> Path:
    folder = project.model("both", BOTH_SPEC, network_py=BOTH)
    torch.manual_seed(0)
    layers = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "head": nn.Linear(7, 4)})
    save_file(layers.state_dict(), folder / "weights.safetensors")
    (folder / "samples").mkdir()
    random = np.random.default_rng(0)
    for path in PHOTOGRAPHS:
        with Image.open(path) as image:
            image.resize((40, 30)).save(folder / f"samples/{path.stem}.png")
        np.savez(folder / f"samples/{path.stem}.npz", vector=random.normal(size=2))
    return folder


def feed(length: int, seed: int) -> dict[str, Any]:
    return {"ids": np.random.default_rng(seed).integers(0, 50, length), "mask": np.ones(length, np.int64)}


def test_samples_of_other_lengths_pictures_beside_arrays_and_none_at_all(project: Project) -> None:
    folder = add_encoder(project, "texts", 'samples = "samples"')
    (folder / "samples").mkdir()
    for index, length in enumerate(LENGTHS):
        np.savez(folder / f"samples/{index}.npz", **feed(length, index))
    add_encoder(project, "random")
    runs = add_encoder(project, "runs", 'samples = "inputs.json"')
    batches = [{name: array[None].repeat(2, 0) for name, array in feed(n, n).items()} for n in (2, 8, 4, 5, 6)]
    save_json(batches, str(runs / "inputs.json"))
    add_both(project)
    add_listener(project)
    add_segmenter(project)
    out = project.built().out

    groups = load_json(project / "build/texts/samples.json")
    assert [group["ids"].shape for group in groups] == [(3, 3), (2, 5), (1, 7)]
    names = (project / "build/texts/samples.txt").read_text().split()
    assert names == ["0.npz", "2.npz", "5.npz", "1.npz", "4.npz", "3.npz"]
    for artifact in ("model.pt", "model.onnx"):
        measured = json.loads((project / f"build/texts/{artifact}.measured.json").read_text())
        assert (measured["samples"], measured["distinct"]) == (6, 6)
        assert {name: len(output["errors"]) for name, output in measured["outputs"].items()} == {
            "states": 6,
            "scores": 6,
        }
    assert [group["ids"].shape for group in load_json(project / "build/runs/samples.json")] == [
        (2, length) for length in (2, 8, 4, 5, 6)
    ]

    random = load_json(project / "build/random/samples.json")
    assert [group["ids"].shape for group in random] == [(16, 6), (2, 2), (2, 8), (2, 5)]
    assert all(group["mask"].min() == group["mask"].max() == 1 for group in random)
    assert "random: by the ranges of [[inputs]], since there are no accuracy.samples" in out
    assert "accuracy: ok on random samples" in out
    summary = json.loads((project / "build/random/accuracy.json").read_text())
    assert summary["samples"]["source"] == "random values, by the ranges of [[inputs]]"

    (both,) = load_json(project / "build/both/samples.json")
    assert both["image"].shape == (7, 3, 16, 12)
    first = PHOTOGRAPHS[0].stem
    assert (project / "build/both/samples.txt").read_text().split()[0] == f"{first}.png"
    assert both["vector"][0] == pytest.approx(np.load(project / f"models/both/samples/{first}.npz")["vector"])

    (waves,) = load_json(project / "build/listener/samples.json")
    assert (waves["waveform"].shape, waves["waveform"].dtype) == ((8, 500), np.float32)
    profile = json.loads((project / "build/listener/model.rtx.signature.json").read_text())["profiles"][0]["waveform"]
    assert profile == {"min": [1, 100], "opt": [4, 400], "max": [4, 800]}
    config = (project / "model_repository/segmenter_onnx/config.pbtxt").read_text()
    assert 'name: "mask"' in config
    assert "aux" not in config

    assert_clients_prepare_pictures_as_the_samples(project)


def assert_clients_prepare_pictures_as_the_samples(project: Project) -> None:
    """Beside a vector, by what --help and the first lines of the clients say; Triton's core answers them."""
    folder, samples = project / "build/both/clients/both_onnx", project / "models/both/samples"
    settings = json.loads((folder / "preprocessing.json").read_text())
    assert settings == json.loads((project / "model_repository/both_onnx/preprocessing.json").read_text())
    pictures = [samples / name for name in (project / "build/both/samples.txt").read_text().split()]
    (both,) = load_json(project / "build/both/samples.json")
    for index, path in enumerate(pictures):
        prepared = preprocess(str(path), settings["image"])
        assert np.array_equal(prepared, both["image"][index])
        assert prepared.dtype == np.float32
    np.savez(project / "batch.npz", vector=both["vector"][:2])
    scores = RunResults.load(project / "build/both/reference.json")["pytorch-fp32"][0]["OUTPUT__0"]
    with core_server.serving(project) as server:
        assert server.load("both_onnx") is None
        for protocol, url in (("http", server.http), ("grpc", server.grpc)):
            client = [sys.executable, str(folder / f"{protocol}_client.py"), "--url", url]
            command = [*client, "--image", *map(str, pictures[:2]), "--arrays", str(project / "batch.npz")]
            run = subprocess.run(command, text=True, capture_output=True)
            assert run.returncode == 0, run.stderr
            lines = run.stdout.splitlines()
            assert [lines[0], lines[5]] == [str(path) for path in pictures[:2]]
            assert [float(lines[first].split()[0]) for first in (1, 6)] == pytest.approx(scores[:2].max(1), abs=2e-4)


def test_a_sample_that_lacks_its_arrays_is_named(project: Project) -> None:
    folder = add_both(project)
    (folder / "samples/brick.npz").unlink()
    line = "models/both/samples/brick.npz does not exist, and has to hold vector of this sample"
    assert line in failure_line(project.doit("reference:both"), "reference:both")
    np.savez(folder / "samples/brick.npz", vector=np.zeros((1, 2)))
    line = "models/both/samples/brick.npz: expected one sample beside pictures, without a batch, found 1"
    assert line in failure_line(project.doit("reference:both"), "reference:both")
    np.savez(folder / "samples/brick.npz", vector=np.full(2, np.inf))
    line = "models/both/samples/brick.npz: vector contains a NaN or an infinity"
    assert line in failure_line(project.doit("reference:both"), "reference:both")
