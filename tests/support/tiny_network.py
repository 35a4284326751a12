"""A network of 164 parameters, with a spec of one format that needs no GPU; it takes all stages in a second."""

from pathlib import Path

from tests.support.project import Project

NETWORK = """\
import torch
from torch import nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.conv(x)
        {body}
        return self.head(x.mean(dim=(2, 3)))


def build():
    return Network()
"""

SPEC = """\
formats = [{formats}]
max_batch_size = 3

[architecture]
network = "network.py:build"

[input]
shape = [3, 16, 16]
{input}

[weights]
source = "weights.safetensors"

[onnx]
{onnx}

[engine]
{engine}
"""


def add(
    project: Project,
    name: str,
    engine: str = "",
    *,
    onnx: str = "",
    input_table: str = "",
    body: str = "",
    formats: str = '"rtx"',
) -> Path:
    """A model of this network in the project; `body` is the middle of its forward()."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    spec = SPEC.format(engine=engine, onnx=onnx, input=input_table, formats=formats)
    folder = project.model(name, spec, network_py=NETWORK.replace("{body}", body))
    torch.manual_seed(1)
    layers = nn.ModuleDict({"conv": nn.Conv2d(3, 5, 3), "head": nn.Linear(5, 4)})
    save_file(layers.state_dict(), folder / "weights.safetensors")  # in a file, so that its answers are judged
    return folder
